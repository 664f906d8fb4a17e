"""Samples from a model that is in memory already, such as the student that is being trained.

No copy of the weights is made and nothing is published: the next call samples from what the optimizer left. Slots bound
the memory; requests beyond them wait and enter as others end.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from transformers import PreTrainedModel

from opd.errors import ConfigError
from opd.types import Rollout
from services.trainer.rollout.base import RolloutRequest, SamplingParams, check_request, check_score_top_k
from services.trainer.rollout.decode_batch import DecodeBatch
from services.trainer.rollout.slot_model import SlotModel
from services.trainer.threads import computing_with


class TransformersEngine:
    """A `RolloutEngine` over a transformers model with attention caches.

    `score_top_k` ids per position are recorded with log-probs and entropy; None records nothing but tokens: log-probs
    and entropy are then NaN and the top-k tables have shape [R, 0]. `autocast_dtype` runs the layers of an fp32 student
    in lower precision, as training does on CUDA; the output head and all that follows stays in fp32. `num_threads` is
    how many threads of a CPU sample; None leaves it at what torch computes with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Collection[int],
        num_defined_ids: int,
        score_top_k: int | None,
        max_slots: int = 256,
        max_prefill_tokens: int = 16384,
        autocast_dtype: torch.dtype | None = None,
        num_threads: int | None = None,
    ) -> None:
        if max_slots < 1:
            raise ConfigError(f"rollout.max_slots: {max_slots} is too small; give 1 or more")
        check_score_top_k(score_top_k, num_defined_ids)
        self.policy_version = 0
        self.samples_elsewhere = False
        self._slot_model = SlotModel(model, num_defined_ids=num_defined_ids, autocast_dtype=autocast_dtype)
        self._stop_ids = frozenset(eos_token_ids)
        self._score_top_k = score_top_k
        self._max_slots = max_slots
        self._max_prefill_tokens = max_prefill_tokens
        self._num_threads = num_threads

    @property
    def max_context(self) -> int:
        return self._slot_model.max_context

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        *,
        on_finish: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """See `RolloutEngine.sample`."""
        sampling.check()
        for request in requests:
            check_request(
                request, sampling, num_defined_ids=self._slot_model.num_defined_ids, max_context=self.max_context
            )
        if not requests:
            return []
        rollouts: dict[int, Rollout] = {}
        with computing_with(self._num_threads), self._slot_model.sampling_mode():
            for index, rollout in self._batch(requests, sampling).run():
                rollouts[index] = rollout
                if on_finish is not None:
                    on_finish(rollout)
        return [rollouts[index] for index in range(len(requests))]

    def _batch(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> DecodeBatch:
        return DecodeBatch(
            self._slot_model,
            requests,
            sampling,
            stop_ids=self._stop_ids,
            num_slots=self._max_slots,
            score_top_k=self._score_top_k,
            max_prefill_tokens=self._max_prefill_tokens,
            policy_version=self.policy_version,
        )
