"""Scored rollouts as tensors: what one forward and backward pass of the student works on.

B rollouts of one micro-batch, N their tokens one after the other, P prompt and R response tokens of one rollout, T
response positions of all B rollouts likewise, K student support ids, k teacher top-k ids. Nothing is padded, so that a
mean over positions needs no mask of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.errors import InternalError
from opd.types import PAD_ID, Rollout, Scores
from services.trainer.packing import PackedTokens, pack, split_by_tokens

MAX_LAID_OUT = 4
"""How many times as many tokens as are computed attention may read in one pass, of prompts that rollouts share."""

Column: TypeAlias = NDArray[np.generic] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRollout:
    """A rollout and what the teacher says of it: the unit that trains."""

    rollout: Rollout
    scores: Scores
    supervised_tokens: int | None = None
    """Leading response positions the teacher's signal trains; None means all."""
    advantage: float | None = None
    """Of its reward within the group; None where answers are not verified."""
    has_entropy_bonus: bool = False
    """Whether the student's entropy is part of the loss, which it is at every position."""

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens."""
        return int(self.rollout.prompt_token_ids.size + self.rollout.response_token_ids.size)

    @property
    def num_response_tokens(self) -> int:
        return int(self.rollout.response_token_ids.size)

    @property
    def num_supervised_tokens(self) -> int:
        """Response positions that the teacher's signal trains."""
        length = self.num_response_tokens
        return length if self.supervised_tokens is None else min(length, self.supervised_tokens)

    @property
    def num_trained_tokens(self) -> int:
        """Response positions that train by any term: with an outcome or an entropy bonus also those beyond the
        horizon."""
        trains_beyond = self.advantage is not None or self.has_entropy_bonus
        return self.num_response_tokens if trains_beyond else self.num_supervised_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillBatch:
    """One micro-batch. Ids are int64; log-probs float32, natural, at the temperatures they were asked for."""

    rollout_ids: tuple[str, ...]
    """[B]"""
    tokens: PackedTokens
    """Prompts and responses."""
    rollout_index_T: Tensor
    """Which of the B rollouts a position belongs to."""
    position_T: Tensor
    """Index of a position within its response."""
    sampled_ids_T: Tensor
    support_ids_TK: Tensor
    """The student's top-k at rollout time; `PAD_ID` for rollouts in which nobody looked for it."""
    rollout_logprobs_T: Tensor
    """Of the sampled tokens, under the sampler actually used."""
    student_sampled_logprobs_T: Tensor
    """Of the sampled tokens at rollout time, over the full vocabulary."""
    student_support_logprobs_TK: Tensor
    """At rollout time."""
    student_entropy_T: Tensor
    supervised_T: Tensor
    """Bool: which positions the teacher's signal trains."""
    valid_T: Tensor
    """Bool: which positions train at all."""
    num_trained_T: Tensor
    """How many positions of the position's rollout train."""
    teacher_sampled_logprobs_T: Tensor | None = None
    """This and the following: only where every rollout has them."""
    teacher_support_logprobs_TK: Tensor | None = None
    """The teacher's log-probs at `support_ids_TK`."""
    teacher_topk_ids_Tk: Tensor | None = None
    teacher_topk_logprobs_Tk: Tensor | None = None
    teacher_entropy_T: Tensor | None = None
    teacher_hidden_TG: Tensor | None = None
    """The teacher's states after its final norm, of its own hidden size G."""
    advantage_T: Tensor | None = None
    """Of the position's rollout within its group."""

    @property
    def num_rollouts(self) -> int:
        return len(self.rollout_ids)

    @property
    def num_positions(self) -> int:
        """T"""
        return self.sampled_ids_T.numel()

    def name_position(self, row: int) -> str:
        """How an error names one of the T positions."""
        rollout = self.rollout_ids[int(self.rollout_index_T[row])]
        return f"response position {int(self.position_T[row])} of rollout {rollout}"


def micro_batches(
    scored: Sequence[ScoredRollout], max_tokens: int, *, shares_prompts: bool = True
) -> list[list[ScoredRollout]]:
    """Splits rollouts so that each part holds at most `max_tokens` tokens, which no padding adds to.

    Where the model `shares_prompts`, rollouts of one prompt stay together where they fit, and count it once; attention
    reads it for each of them, and a part holds at most `MAX_LAID_OUT` times as many tokens there. A rollout longer than
    that gets a part of its own. Within a part the longest come first. The split depends on lengths and ids alone, never
    on the order of arrival.
    """
    groups: dict[tuple[int, bytes], list[ScoredRollout]] = {}
    for item in scored:
        groups.setdefault((item.rollout.group, item.rollout.prompt_token_ids.tobytes()), []).append(item)
    units = [
        unit
        for siblings in groups.values()
        for unit in (_together(siblings, max_tokens) if shares_prompts else [[item] for item in siblings])
    ]
    parts = split_by_tokens(units, max_tokens, size=_cost_of, name=_first_id)
    return [
        sorted((item for unit in part for item in unit), key=lambda item: (-item.num_tokens, item.rollout.rollout_id))
        for part in parts
    ]


def _together(siblings: Sequence[ScoredRollout], max_tokens: int) -> list[list[ScoredRollout]]:
    """As many of a prompt's rollouts at a time as fit, the longest first."""
    num_prompt = int(siblings[0].rollout.prompt_token_ids.size)
    units: list[list[ScoredRollout]] = []
    num_responses = 0
    for item in sorted(siblings, key=lambda item: (-item.num_tokens, item.rollout.rollout_id)):
        num_responses += item.num_response_tokens
        if units and _cost(num_prompt, len(units[-1]) + 1, num_responses) <= max_tokens:
            units[-1].append(item)
        else:
            units.append([item])
            num_responses = item.num_response_tokens
    return units


def _cost_of(siblings: Sequence[ScoredRollout]) -> int:
    num_prompt = int(siblings[0].rollout.prompt_token_ids.size)
    return _cost(num_prompt, len(siblings), sum(item.num_response_tokens for item in siblings))


def _cost(num_prompt: int, num_rollouts: int, num_responses: int) -> int:
    """What counts of a prompt's rollouts: what is computed, or where that is more their part of what attention reads.

    Where such costs add up to a budget, neither sum is above its own bound.
    """
    laid_out = num_prompt * num_rollouts + num_responses
    return max(num_prompt + num_responses, -(-laid_out // MAX_LAID_OUT))


def _first_id(siblings: Sequence[ScoredRollout]) -> str:
    return min(item.rollout.rollout_id for item in siblings)


def build_batch(scored: Sequence[ScoredRollout], device: torch.device | str = "cpu") -> DistillBatch:
    """Packs one part into tensors. `InternalError` when a rollout's columns are not of its length."""
    rollouts = [item.rollout for item in scored]
    lengths_B = torch.tensor([item.num_response_tokens for item in scored])
    trained_B = torch.tensor([item.num_trained_tokens for item in scored])
    position_T = torch.cat([torch.arange(length) for length in lengths_B])

    def packed(column: Callable[[ScoredRollout], Column], dtype: torch.dtype = torch.float32) -> Tensor:
        return _packed([column(item) for item in scored], rollouts, dtype).to(device)

    def optional(column: Callable[[ScoredRollout], Column], dtype: torch.dtype = torch.float32) -> Tensor | None:
        return None if any(column(item) is None for item in scored) else packed(column, dtype)

    def per_position(values_B: Tensor) -> Tensor:
        return torch.repeat_interleave(values_B, lengths_B)

    supervised_B = torch.tensor([item.num_supervised_tokens for item in scored])
    return DistillBatch(
        rollout_ids=tuple(rollout.rollout_id for rollout in rollouts),
        tokens=pack(rollouts, device),
        rollout_index_T=per_position(torch.arange(len(scored))).to(device),
        position_T=position_T.to(device),
        supervised_T=(position_T < per_position(supervised_B)).to(device),
        valid_T=(position_T < per_position(trained_B)).to(device),
        num_trained_T=per_position(trained_B).to(device),
        sampled_ids_T=packed(lambda item: item.rollout.response_token_ids, torch.int64),
        support_ids_TK=packed(lambda item: item.rollout.topk_token_ids, torch.int64),
        rollout_logprobs_T=packed(lambda item: item.rollout.rollout_logprobs),
        student_sampled_logprobs_T=packed(lambda item: item.rollout.sampled_logprobs),
        student_support_logprobs_TK=packed(lambda item: item.rollout.topk_logprobs),
        student_entropy_T=packed(lambda item: item.rollout.entropy),
        teacher_sampled_logprobs_T=optional(lambda item: item.scores.sampled_logprobs),
        teacher_support_logprobs_TK=optional(lambda item: item.scores.candidate_logprobs),
        teacher_topk_ids_Tk=optional(lambda item: item.scores.topk_token_ids, torch.int64),
        teacher_topk_logprobs_Tk=optional(lambda item: item.scores.topk_logprobs),
        teacher_entropy_T=optional(lambda item: item.scores.entropy),
        teacher_hidden_TG=optional(lambda item: item.scores.hidden_states),
        advantage_T=optional(_advantages),
    )


def _advantages(item: ScoredRollout) -> Column:
    if item.advantage is None:
        return None
    return np.full(item.num_response_tokens, item.advantage, dtype=np.float64)


def _packed(columns: Sequence[Column], rollouts: Sequence[Rollout], dtype: torch.dtype) -> Tensor:
    """Joins one array per rollout along positions, after checking that each has one row per response token."""
    arrays = []
    for column, rollout in zip(columns, rollouts, strict=True):
        if column is None or column.shape[0] != rollout.response_token_ids.size:
            found = "nothing" if column is None else f"{column.shape[0]} rows"
            raise InternalError(
                f"rollout {rollout.rollout_id}: {found} for {rollout.response_token_ids.size} response tokens"
            )
        arrays.append(column)
    return torch.from_numpy(np.concatenate(_of_one_width(arrays))).to(dtype)


def _of_one_width(arrays: list[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
    """A rollout whose ids nobody looked for has no columns beside others that have k: it gets unused ones."""
    widest = max(arrays, key=lambda array: array.shape[-1] if array.ndim > 1 else 0)
    if widest.ndim == 1 or all(array.shape[1] for array in arrays):
        return arrays
    unused = PAD_ID if np.issubdtype(widest.dtype, np.integer) else np.nan
    return [
        array if array.shape[1] else np.full((len(array), widest.shape[1]), unused, widest.dtype) for array in arrays
    ]
