"""The rows that decode together: filled from waiting requests, advanced one token at a time, closed up as rows end.

Legend: S slots, N rows in use (always the first N slots). Lengths live on the host, where they grow by 1 a step without
asking the device; chosen tokens come back once a step to find the rows that ended. A prompt's last token is not part of
its prefill: it is the first token decoded, so that every logit comes from one place.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch

from opd.errors import NonFiniteError
from opd.ops import row_statistics
from opd.types import FinishReason, Rollout
from services.trainer.rollout.base import RolloutRequest, SamplingParams
from services.trainer.rollout.recording import Recording
from services.trainer.rollout.slot_cache import Prefill
from services.trainer.rollout.slot_model import SlotModel
from services.trainer.rollout.token_choice import Choice, choose_tokens
from services.trainer.rollout.uniforms import stream_states, uniforms

_REFILL_FRACTION = 0.125
"""Free share of the slots at which waiting requests are taken in: a prefill costs about as much as a step."""


class DecodeBatch:
    """One call of `sample`: every request goes in once and comes out once, as (index of the request, rollout)."""

    def __init__(
        self,
        model: SlotModel,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        *,
        stop_ids: frozenset[int],
        num_slots: int,
        score_top_k: int | None,
        max_prefill_tokens: int,
        policy_version: int,
    ) -> None:
        self._model = model
        self._requests = requests
        self._sampling = sampling
        self._stop_ids = np.array(sorted(stop_ids), dtype=np.int64)
        self._score_top_k = score_top_k
        self._max_prefill_tokens = max_prefill_tokens
        self._policy_version = policy_version
        self._num_slots = min(num_slots, len(requests))
        self._waiting = deque(range(len(requests)))
        self._rows: list[int] = []
        self._lengths_S = np.zeros(self._num_slots, dtype=np.int64)
        self._generated_S = np.zeros(self._num_slots, dtype=np.int64)
        self._next_ids_S = torch.zeros(self._num_slots, dtype=torch.int64, device=model.device)
        self._streams_S = torch.zeros(self._num_slots, dtype=torch.int64, device=model.device)
        self._cache = model.cache(self._num_slots)
        self._recording = Recording(num_slots=self._num_slots, score_top_k=score_top_k, device=model.device)
        self._max_tokens = max(len(request.prompt_token_ids) for request in requests) + sampling.max_response_tokens

    def run(self) -> Iterator[tuple[int, Rollout]]:
        """Yields each rollout in the step in which it ends."""
        while self._waiting or self._rows:
            num_free = self._num_slots - len(self._rows)
            if self._waiting and num_free >= max(1, min(len(self._waiting), self._num_slots * _REFILL_FRACTION)):
                self._admit(num_free)
            ended = self._step()
            for slot, reason in ended.items():
                yield self._rows[slot], self._rollout(slot, reason)
            if ended:
                self._close_up(ended.keys())

    def _admit(self, num_free: int) -> None:
        """Takes waiting requests into the first free slots; requests with the same prompt share its prefill."""
        first = len(self._rows)
        taken = [self._waiting.popleft() for _ in range(min(num_free, len(self._waiting)))]
        slots = np.arange(first, first + len(taken))
        prompts = [np.asarray(self._requests[index].prompt_token_ids, dtype=np.int64) for index in taken]
        self._lengths_S[slots] = [len(prompt) - 1 for prompt in prompts]
        self._generated_S[slots] = 0
        window = slice(first, first + len(taken))
        self._next_ids_S[window] = self._tensor([prompt[-1] for prompt in prompts])
        self._streams_S[window] = stream_states(self._tensor([self._seed(index) for index in taken]))
        self._cache.reserve(max(len(prompt) for prompt in prompts), self._max_tokens)
        by_prompt: dict[bytes, list[int]] = {}
        for slot, prompt in zip(slots.tolist(), prompts, strict=True):
            if len(prompt) > 1:
                by_prompt.setdefault(prompt[:-1].tobytes(), []).append(slot)
        self._prefill(sorted(by_prompt.items(), key=lambda item: len(item[0])))
        self._rows.extend(taken)

    def _prefill(self, slots_by_prompt: list[tuple[bytes, list[int]]]) -> None:
        """Runs distinct prompts, shortest first, as many at a time as `max_prefill_tokens` allows with padding."""
        group: list[tuple[bytes, list[int]]] = []
        for item in slots_by_prompt:
            num_tokens = len(item[0]) // np.dtype(np.int64).itemsize
            if group and num_tokens * (len(group) + 1) > self._max_prefill_tokens:
                self._prefill_group(group)
                group = []
            group.append(item)
        if group:
            self._prefill_group(group)

    def _prefill_group(self, group: list[tuple[bytes, list[int]]]) -> None:
        prompts = [torch.from_numpy(np.frombuffer(prompt, dtype=np.int64).copy()) for prompt, _ in group]
        pairs = [(slot, source) for source, (_, slots) in enumerate(group) for slot in slots]
        plan = Prefill(
            slots_M=self._tensor([slot for slot, _ in pairs]), sources_M=self._tensor([source for _, source in pairs])
        )
        self._model.prefill(self._cache, prompts, plan)

    def _seed(self, index: int) -> int:
        # Wrapped to int64, the way tensors hold 64-bit integers.
        mixed = (self._requests[index].seed ^ (self._sampling.seed * 0x9E3779B97F4A7C15)) & (2**64 - 1)
        return mixed - 2**64 if mixed >= 2**63 else mixed

    def _tensor(self, values: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.tensor(np.asarray(values, dtype=np.int64), device=self._model.device)

    def _step(self) -> dict[int, FinishReason]:
        """Decodes one token a row; returns the slots that ended and why."""
        num_rows = len(self._rows)
        lengths_N, generated_N = self._lengths_S[:num_rows], self._generated_S[:num_rows]
        horizon = int(lengths_N.max()) + 1
        self._cache.reserve(horizon, self._max_tokens)
        self._recording.reserve(int(generated_N.max()) + 1)
        positions_N = self._tensor(generated_N)
        logits_NV = self._model.decode(self._cache, self._next_ids_S[:num_rows], self._tensor(lengths_N), horizon)
        choice = self._choose(logits_NV, positions_N)
        lengths_N += 1
        generated_N += 1
        self._next_ids_S[:num_rows] = choice.token_ids_B
        return self._ended(choice, logits_NV)

    def _choose(self, logits_NV: torch.Tensor, positions_N: torch.Tensor) -> Choice:
        uniforms_N = uniforms(self._streams_S[: len(self._rows)], positions_N)
        choice = choose_tokens(logits_NV, uniforms_N, self._sampling)
        statistics = None
        if self._score_top_k is not None:
            statistics = row_statistics(
                logits_NV,
                num_defined_ids=logits_NV.shape[1],
                sampled_ids_T=choice.token_ids_B,
                score_top_k=self._score_top_k,
                temperature=self._sampling.temperature or 1.0,
                wants_entropy=True,
            )
        self._recording.write(positions_N, choice, statistics)
        return choice

    def _ended(self, choice: Choice, logits_NV: torch.Tensor) -> dict[int, FinishReason]:
        # The sum is finite only if every logit is: one number a row tells, and travels with the tokens.
        is_finite_N = logits_NV.sum(dim=-1).isfinite()
        token_ids_N, finite_N = torch.stack([choice.token_ids_B, is_finite_N.to(torch.int64)]).cpu().numpy()
        if not finite_N.all():
            slot = int((finite_N == 0).argmax())
            request = self._requests[self._rows[slot]]
            raise NonFiniteError(
                f"rollout {request.rollout_id}: the student's logits at response position "
                f"{self._generated_S[slot] - 1} are NaN or infinite; resume from an earlier checkpoint"
            )
        stopped_N = np.isin(token_ids_N, self._stop_ids)
        cut_off_N = self._generated_S[: len(self._rows)] >= self._sampling.max_response_tokens
        return {
            int(slot): FinishReason.STOP if stopped_N[slot] else FinishReason.LENGTH
            for slot in np.flatnonzero(stopped_N | cut_off_N)
        }

    def _rollout(self, slot: int, reason: FinishReason) -> Rollout:
        request = self._requests[self._rows[slot]]
        return self._recording.rollout(slot, int(self._generated_S[slot]), request, reason, self._policy_version)

    def _close_up(self, gone: Collection[int]) -> None:
        """Moves the last rows into the slots of those that ended, so that the rows in use are the first again."""
        num_left = len(self._rows) - len(gone)
        targets = [slot for slot in gone if slot < num_left]
        sources = [slot for slot in range(num_left, len(self._rows)) if slot not in gone]
        for target, source in zip(targets, sources, strict=True):
            self._rows[target] = self._rows[source]
        del self._rows[num_left:]
        if not targets:
            return
        sources_M, targets_M = self._tensor(sources), self._tensor(targets)
        self._cache.move(sources_M, targets_M, int(self._lengths_S[sources].max()))
        self._recording.move(sources_M, targets_M)
        for table in (self._lengths_S, self._generated_S):
            table[targets] = table[sources]
        for tensor in (self._next_ids_S, self._streams_S):
            tensor[targets_M] = tensor[sources_M]
