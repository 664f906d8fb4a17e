"""Sampler and student that sleep as long as they are told; loop, queue and teacher around them are the real ones."""

import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from benchmarks.pipeline_ideal import end_times
from opd.types import FinishReason, Rollout
from services.trainer.batch import DistillBatch
from services.trainer.diagnostics.means import Mean
from services.trainer.objectives.contract import LossOutput
from services.trainer.rollout.base import RolloutRequest, SamplingParams
from services.trainer.student import Student


class TimedEngine:
    """Slots that decode one token every `step_s`; the response lengths of a step are `lengths(step)`."""

    def __init__(
        self, lengths: Callable[[int], Sequence[int]], *, slots: int, step_s: float, samples_elsewhere: bool = False
    ) -> None:
        self.policy_version = 0
        self.samples_elsewhere = samples_elsewhere
        self.max_context = 1 << 20
        self._lengths = lengths
        self._slots = slots
        self._step_s = step_s
        self._num_calls = 0

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        *,
        on_finish: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """Hands each rollout over when it ends. What `on_finish` takes delays the rest, unless it samples elsewhere."""
        del sampling
        lengths = self._lengths(self._num_calls)
        self._num_calls += 1
        ends = end_times(lengths, self._slots, self._step_s)
        order = sorted(range(len(requests)), key=ends.__getitem__)
        rollouts = {index: _rollout(requests[index], lengths[index], self.policy_version) for index in order}
        if on_finish is not None:
            if self.samples_elsewhere:
                self._beside(order, ends, lambda index: on_finish(rollouts[index]))
            else:
                self._between(order, ends, lambda index: on_finish(rollouts[index]))
        return [rollouts[index] for index in range(len(requests))]

    def _between(self, order: Sequence[int], ends: Sequence[float], finish: Callable[[int], None]) -> None:
        due, last = time.perf_counter(), 0.0
        for index in order:
            due += ends[index] - last
            last = ends[index]
            time.sleep(max(0.0, due - time.perf_counter()))
            begun = time.perf_counter()
            finish(index)
            due += time.perf_counter() - begun

    def _beside(self, order: Sequence[int], ends: Sequence[float], finish: Callable[[int], None]) -> None:
        ended: SimpleQueue[int] = SimpleQueue()
        begun = time.perf_counter()

        def decode() -> None:
            for index in order:
                time.sleep(max(0.0, begun + ends[index] - time.perf_counter()))
                ended.put(index)

        Thread(target=decode, daemon=True).start()
        for _ in order:
            finish(ended.get())


class TimedLoss:
    """Takes `token_s` for each prompt and response token, forward and backward together."""

    def __init__(self, weight: torch.Tensor, *, token_s: float) -> None:
        self._weight = weight
        self._token_s = token_s

    def __call__(self, batch: DistillBatch) -> LossOutput:
        time.sleep(self._token_s * len(batch.tokens.input_ids_N))
        num_positions = batch.num_positions
        return LossOutput(
            loss_sum=self._weight.sum() * num_positions,
            position_loss_T=torch.zeros(num_positions),
            num_positions=num_positions,
            metrics={"loss/objective": Mean(total=0.0, count=num_positions)},
        )


def timed_student() -> Student:
    """What the loop asks of a student beside its loss."""
    return cast(Student, SimpleNamespace(device=torch.device("cpu"), shares_prompts=False))


def _rollout(request: RolloutRequest, length: int, version: int) -> Rollout:
    ids = np.random.default_rng(request.seed).integers(0, 1000, length, dtype=np.int32)
    ones: Any = np.full(length, -1.0, dtype=np.float32)
    return Rollout(
        rollout_id=request.rollout_id,
        group=request.group,
        prompt_token_ids=request.prompt_token_ids,
        response_token_ids=ids,
        finish_reason=FinishReason.STOP,
        rollout_logprobs=ones,
        sampled_logprobs=ones,
        topk_token_ids=np.zeros((length, 0), dtype=np.int32),
        topk_logprobs=np.zeros((length, 0), dtype=np.float32),
        entropy=ones,
        policy_version=version,
    )
