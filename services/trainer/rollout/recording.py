"""What the sampler saw, kept per slot while a response grows and cut out when it ends.

Legend: S slots, N rows in use, k `score_top_k`. One float and one integer table [S, capacity, fields] on the device; a
step writes one line of each row with one operation, and storage doubles when responses outgrow it.
"""

import numpy as np
import torch

from opd.ops import RowStatistics
from opd.types import FinishReason, Rollout
from services.trainer.rollout.base import RolloutRequest
from services.trainer.rollout.token_choice import Choice

_ROLLOUT, _SAMPLED, _ENTROPY, _TOP_K = 0, 1, 2, 3


class Recording:
    """Token ids of every row and, unless `score_top_k` is None, its statistics."""

    def __init__(self, *, num_slots: int, score_top_k: int | None, device: torch.device) -> None:
        self._num_top = 0 if score_top_k is None else score_top_k
        self._has_statistics = score_top_k is not None
        self._ids = torch.zeros(num_slots, 0, 1 + self._num_top, dtype=torch.int32, device=device)
        num_floats = _TOP_K + self._num_top if self._has_statistics else 0
        self._floats = torch.zeros(num_slots, 0, num_floats, dtype=torch.float32, device=device)

    def reserve(self, num_tokens: int) -> None:
        capacity = self._ids.shape[1]
        if num_tokens > capacity:
            self._ids = _grown(self._ids, max(num_tokens, 2 * capacity, 64))
            self._floats = _grown(self._floats, max(num_tokens, 2 * capacity, 64))

    def write(self, positions_N: torch.Tensor, choice: Choice, statistics: RowStatistics | None) -> None:
        """Stores one token of each of the first N slots at its response position."""
        rows_N = torch.arange(positions_N.shape[0], device=positions_N.device)
        token_ids_N1 = choice.token_ids_B[:, None]
        if statistics is None:
            self._ids[rows_N, positions_N] = token_ids_N1.to(torch.int32)
            return
        sampled_N, entropy_N = statistics.sampled_logprobs_T, statistics.entropy_T
        assert sampled_N is not None and entropy_N is not None
        columns = [(sampled_N - choice.kept_log_mass_B)[:, None], sampled_N[:, None], entropy_N[:, None]]
        ids = [token_ids_N1]
        if statistics.topk_ids_Tk is not None and statistics.topk_logprobs_Tk is not None:
            columns.append(statistics.topk_logprobs_Tk)
            ids.append(statistics.topk_ids_Tk)
        self._ids[rows_N, positions_N] = torch.cat(ids, dim=1).to(torch.int32)
        self._floats[rows_N, positions_N] = torch.cat(columns, dim=1).to(self._floats.dtype)

    def move(self, sources_M: torch.Tensor, targets_M: torch.Tensor) -> None:
        self._ids[targets_M] = self._ids[sources_M]
        self._floats[targets_M] = self._floats[sources_M]

    def rollout(
        self, slot: int, num_tokens: int, request: RolloutRequest, reason: FinishReason, policy_version: int
    ) -> Rollout:
        """The rollout that ended in this slot; without statistics its log-probs are NaN and its top-k [R, 0]."""
        ids = self._ids[slot, :num_tokens].cpu().numpy().copy()
        floats = self._floats[slot, :num_tokens].cpu().numpy().copy()
        if not self._has_statistics:
            floats = np.full((num_tokens, _TOP_K), np.nan, dtype=np.float32)
        return Rollout(
            rollout_id=request.rollout_id,
            group=request.group,
            prompt_token_ids=request.prompt_token_ids,
            response_token_ids=np.ascontiguousarray(ids[:, 0]),
            finish_reason=reason,
            rollout_logprobs=np.ascontiguousarray(floats[:, _ROLLOUT]),
            topk_token_ids=np.ascontiguousarray(ids[:, 1:]),
            topk_logprobs=np.ascontiguousarray(floats[:, _TOP_K:]),
            sampled_logprobs=np.ascontiguousarray(floats[:, _SAMPLED]),
            entropy=np.ascontiguousarray(floats[:, _ENTROPY]),
            policy_version=policy_version,
        )


def _grown(table: torch.Tensor, capacity: int) -> torch.Tensor:
    grown = table.new_zeros(table.shape[0], capacity, table.shape[2])
    grown[:, : table.shape[1]] = table
    return grown
