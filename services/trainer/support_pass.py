"""What a rollout engine does not say of its rollouts, found by one pass of the student without a gradient.

R response tokens of a rollout, k `score_top_k`. The student's support has to be there before a rollout is sent for
scoring, log-probs and entropy only for the metrics; an engine that records them while it samples makes all of this
unnecessary, and what one did record is kept. The output head runs over the whole vocabulary, a chunk of rows at a time.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.errors import NonFiniteError
from opd.ops import RowStatistics
from opd.types import PAD_ID, Floats, Ids, Rollout
from services.trainer.packing import pack, split_by_tokens
from services.trainer.student import Student


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportPass:
    """How rollouts are completed; the weights have to be those that sampled them.

    Example: where rollouts have ids and log-probs but no entropy, those of `measured` are run through the student;
    where they have nothing but tokens and the objective learns at the student's ids, all are.
    """

    student: Student
    score_top_k: int
    """k; 0 wants no ids."""
    needs_support: bool = True
    """Whether the objective learns at the student's ids, so that every rollout needs them."""
    temperature: float = 1.0
    """Of sampling, at which numbers are recorded; 1 for greedy."""
    keeps_every_token: bool = True
    """Whether nothing was cut off (`top_p`, `top_k`), so that a token's log-prob is also the sampler's."""
    max_tokens: int = 32768
    """Of one forward pass; a longer rollout has one of its own."""

    def complete(self, rollouts: Sequence[Rollout], measured: Container[str]) -> list[Rollout]:
        """The rollouts in their order. Those whose ids are in `measured` lack nothing afterwards; others get ids alone,
        and only where the objective needs them.

        Raises `NonFiniteError`, naming the rollout, where the student's logits are not finite.
        """
        in_full = [rollout for rollout in rollouts if rollout.rollout_id in measured and self._lacks_something(rollout)]
        by_id = {rollout.rollout_id: rollout for rollout in in_full}
        for part in self._parts(in_full):
            by_id |= self._with_numbers(part)
        if self.needs_support:
            for part in self._parts(
                [item for item in rollouts if item.rollout_id not in by_id and self._lacks_ids(item)]
            ):
                by_id |= self._with_ids(part)
        return [by_id.get(rollout.rollout_id, rollout) for rollout in rollouts]

    def _parts(self, rollouts: list[Rollout]) -> list[list[Rollout]]:
        return split_by_tokens(rollouts, self.max_tokens, size=_num_tokens, name=lambda item: item.rollout_id)

    def _lacks_ids(self, rollout: Rollout) -> bool:
        return self.score_top_k > 0 and not rollout.topk_token_ids.shape[1]

    def _lacks_something(self, rollout: Rollout) -> bool:
        return self._lacks_ids(rollout) or _is_missing(rollout.entropy) or _is_missing(rollout.sampled_logprobs)

    def _with_ids(self, part: list[Rollout]) -> dict[str, Rollout]:
        tokens = pack(part, self.student.device)
        ids_Tk = self.student.top_k_ids(tokens, self.score_top_k, temperature=self.temperature)
        return {
            rollout.rollout_id: replace(
                rollout,
                topk_token_ids=_ids(ids_Tk, rows, rollout),
                topk_logprobs=np.full((rollout.response_token_ids.size, self.score_top_k), np.nan, np.float32),
            )
            for rollout, rows in _rows(part)
        }

    def _with_numbers(self, part: list[Rollout]) -> dict[str, Rollout]:
        found = self.student.row_statistics(
            pack(part, self.student.device),
            score_top_k=self.score_top_k if any(self._lacks_ids(rollout) for rollout in part) else 0,
            temperature=self.temperature,
            wants_entropy=True,
        )
        return {rollout.rollout_id: self._filled(rollout, found, rows) for rollout, rows in _rows(part)}

    def _filled(self, rollout: Rollout, found: RowStatistics, rows: slice) -> Rollout:
        _require_finite(found.finite_T[rows], rollout)
        sampled_R = _floats(found.sampled_logprobs_T, rows)
        changes: dict[str, Any] = {}
        if _is_missing(rollout.sampled_logprobs):
            changes["sampled_logprobs"] = sampled_R
        if _is_missing(rollout.rollout_logprobs) and self.keeps_every_token:
            changes["rollout_logprobs"] = sampled_R
        if _is_missing(rollout.entropy):
            changes["entropy"] = _floats(found.entropy_T, rows)
        if self._lacks_ids(rollout):
            assert found.topk_ids_Tk is not None
            changes["topk_token_ids"] = _ids(found.topk_ids_Tk, rows, rollout)
            changes["topk_logprobs"] = _floats(found.topk_logprobs_Tk, rows)
        return replace(rollout, **changes)


def measured_places(total: int, *, fraction: float, seed: int, step: int) -> Container[int]:
    """Which of so many rollouts are measured in full, at least one: drawn by seed and step, so the same on a resume."""
    if fraction >= 1:
        return range(total)
    generator = np.random.default_rng([seed, step])
    return set(generator.permutation(total)[: max(1, round(fraction * total))].tolist())


def _num_tokens(rollout: Rollout) -> int:
    return int(rollout.prompt_token_ids.size + rollout.response_token_ids.size)


def _rows(part: Sequence[Rollout]) -> Iterator[tuple[Rollout, slice]]:
    """Each rollout with its response's rows of the part."""
    first = 0
    for rollout in part:
        last = first + rollout.response_token_ids.size
        yield rollout, slice(first, last)
        first = last


def _is_missing(values_R: Floats) -> bool:
    """Not computed is NaN throughout."""
    return bool(np.isnan(values_R).all())


def _ids(ids_Tk: Tensor, rows: slice, rollout: Rollout) -> Ids:
    _require_finite(ids_Tk[rows, 0] != PAD_ID, rollout)
    return ids_Tk[rows].to(torch.int32).cpu().numpy()


def _floats(values: Tensor | None, rows: slice) -> Floats:
    assert values is not None
    return values[rows].float().cpu().numpy()


def _require_finite(finite_R: Tensor, rollout: Rollout) -> None:
    if not finite_R.all():
        position = int((~finite_R).nonzero()[0])
        raise NonFiniteError(
            f"rollout {rollout.rollout_id}: the student's logits at response position {position} are not finite"
        )
