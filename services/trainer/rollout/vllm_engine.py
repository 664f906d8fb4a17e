"""Samples with vLLM in a process of its own, from weights it was given last.

The sampled tokens come with their log-probs and the most likely ids at the sampling temperature. Entropy is over the
whole vocabulary and vLLM has none to give: it is NaN, which the metrics take for not measured; a pass of the trainer
over finished rollouts can fill it in. `rollout_logprobs` equal `sampled_logprobs`, because what is recorded is sampled
from the whole distribution.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict

import numpy as np

from opd.errors import InternalError, NonFiniteError, UnsupportedError
from opd.types import FinishReason, Rollout
from services.trainer.rollout.base import RolloutRequest, SamplingParams, check_request, check_score_top_k, derive_seed
from services.trainer.rollout.vllm_channel import Message
from services.trainer.rollout.vllm_process import VllmProcess

_TIE_MARGIN = 4
"""More ids than wanted, among which ties at the last place can go to the lower id."""


def asked_width(score_top_k: int | None, num_defined_ids: int) -> int:
    """How many of the most likely ids vLLM is asked for at a position."""
    return min(score_top_k + _TIE_MARGIN, num_defined_ids) if score_top_k else 0


class VllmEngine:
    """A `RolloutEngine` over a running `VllmProcess`.

    `score_top_k` ids per position are recorded with log-probs; None records nothing but tokens, as
    `TransformersEngine` does. Several engines may share one process: each call of `sample` has it to itself.
    """

    def __init__(
        self, process: VllmProcess, *, num_defined_ids: int, max_context: int, score_top_k: int | None
    ) -> None:
        check_score_top_k(score_top_k, num_defined_ids)
        self.policy_version = 0
        self.samples_elsewhere = True
        self._process = process
        self._num_defined_ids = num_defined_ids
        self._max_context = max_context
        self._score_top_k = score_top_k

    @property
    def max_context(self) -> int:
        return self._max_context

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        *,
        on_finish: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """See `RolloutEngine.sample`.

        Also raises `UnsupportedError` for a cut distribution where log-probs are recorded, and `RolloutEngineError`
        when the process is gone, or has no whole weights.
        """
        sampling.check()
        self._check_cut(sampling)
        for request in requests:
            check_request(request, sampling, num_defined_ids=self._num_defined_ids, max_context=self._max_context)
        if not requests:
            return []
        prompts = [np.asarray(request.prompt_token_ids, dtype=np.int32) for request in requests]
        fields = {
            "sampling": asdict(sampling),
            "seeds": [derive_seed(sampling.seed, request.seed) for request in requests],
            "width": asked_width(self._score_top_k, self._num_defined_ids),
        }
        arrays = (np.concatenate(prompts), np.array([prompt.size for prompt in prompts], dtype=np.int64))
        rollouts: dict[int, Rollout] = {}
        with closing(self._process.converse("sample", fields, arrays)) as messages:
            for message in messages:
                if message.kind == "finished":
                    index = int(message.fields["index"])
                    rollouts[index] = self._rollout(requests[index], message)
                    if on_finish is not None:
                        on_finish(rollouts[index])
        return [rollouts[index] for index in range(len(requests))]

    def _check_cut(self, sampling: SamplingParams) -> None:
        if self._score_top_k is not None and (sampling.top_p != 1 or sampling.top_k != -1):
            raise UnsupportedError(
                f"sampling.top_p={sampling.top_p}, top_k={sampling.top_k}: vLLM gives log-probs before or after the "
                "cut and not both; keep every token, or sample with transformers"
            )

    def _rollout(self, request: RolloutRequest, message: Message) -> Rollout:
        ids_R, ids_RN, logprobs_RN = message.arrays
        if not np.array_equal(ids_RN[:, 0], ids_R):
            raise InternalError(f"rollout {request.rollout_id}: vLLM's log-probs are of other tokens than it sampled")
        self._check_finite(request, logprobs_RN)
        is_recorded, k = self._score_top_k is not None, self._score_top_k or 0
        order_Rk = np.lexsort((ids_RN[:, 1:], -logprobs_RN[:, 1:]), axis=1)[:, :k] + 1
        nothing_R = np.full(ids_R.shape, np.nan, dtype=np.float32)
        sampled_R = np.ascontiguousarray(logprobs_RN[:, 0]) if is_recorded else nothing_R
        return Rollout(
            rollout_id=request.rollout_id,
            group=request.group,
            prompt_token_ids=request.prompt_token_ids,
            response_token_ids=ids_R,
            finish_reason=FinishReason(message.fields["finish_reason"]),
            rollout_logprobs=sampled_R.copy(),
            topk_token_ids=np.take_along_axis(ids_RN, order_Rk, axis=1),
            topk_logprobs=np.take_along_axis(logprobs_RN, order_Rk, axis=1),
            sampled_logprobs=sampled_R,
            entropy=nothing_R,
            policy_version=self._version(message),
        )

    def _version(self, message: Message) -> int:
        """As the engine says it has: what it samples from cannot be mistaken for what it should."""
        version = message.fields["version"]
        return self.policy_version if version is None else int(version)

    def _check_finite(self, request: RolloutRequest, logprobs_RN: np.ndarray) -> None:
        finite_R = np.isfinite(logprobs_RN).all(axis=1)
        if not finite_R.all():
            raise NonFiniteError(
                f"rollout {request.rollout_id}: the student's log-probs at response position "
                f"{int(np.argmin(finite_R))} are NaN or infinite; resume from an earlier checkpoint"
            )
