"""A teacher that follows the student: teacher <- decay * teacher + (1 - decay) * student, once after each step.

Over n steps this is decay^n theta_0 + (1 - decay) * sum over i of decay^(n - i) theta_i, in fp32. The loop knows
nothing of it: the average moves where weights are published, which happens exactly once per optimizer step. Over
several ranks each has all of the average, since each has its own rollouts scored, and moves it by the same numbers.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from opd.errors import CheckpointError
from opd.types import TeacherInfo
from services.trainer.distributed.sharding import release, whole
from services.trainer.models import LoadedModel
from services.trainer.recipes.self_distillation.teacher import LocalTeacher
from services.trainer.teacher_client import MOVED
from services.trainer.weights import WeightPublisher


class MovingAverageTeacher(LocalTeacher):
    """`loaded.model` holds the average and is changed in place; its fingerprint counts the steps it has followed."""

    def __init__(
        self,
        loaded: LoadedModel,
        student: nn.Module,
        *,
        pool: str,
        decay: float,
        step: int = 0,
        row_chunk: int = 256,
        in_step: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`step`: how many optimizer steps the average in `loaded` has seen. `in_step` is entered where a `student` in
        shards waits for other ranks; see `Ranks.in_step`."""
        super().__init__(loaded, pool=pool, row_chunk=row_chunk)
        self._in_step = in_step
        self._student = student
        self._decay = decay
        self._step = step

    def info(self) -> TeacherInfo:
        # Other weights are another teacher, so that every score says which average it is of.
        info = super().info()
        return replace(info, fingerprint=f"{info.fingerprint}{MOVED}{self._step}")

    def follow(self, step: int) -> None:
        """Moves towards the student as it is after `step` completed steps; a step seen before changes nothing.

        Collective where the student is in shards: one weight after the other is whole for a moment.
        """
        if step <= self._step:
            return
        with torch.no_grad(), self._in_step():
            release(self._student)
            for average, current in zip(self.model.parameters(), self._student.parameters(), strict=True):
                average.lerp_(whole(current), 1.0 - self._decay)
        self._step = step

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resumed run goes on with: every weight of the average by its name."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def load_state_tensors(self, tensors: dict[str, Tensor], step: int) -> None:
        """Takes over what `state_tensors` gave after `step` steps. `CheckpointError` when it is of another model."""
        named = dict(self.model.named_parameters())
        if {name: value.shape for name, value in tensors.items()} != {name: v.shape for name, v in named.items()}:
            raise CheckpointError("moving-average teacher: the checkpoint's is of another model; resume with its model")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensors[name])
        self._step = step


class FollowedWeights:
    """A `WeightPublisher` that lets a moving average follow what it publishes."""

    def __init__(self, inner: WeightPublisher, teacher: MovingAverageTeacher) -> None:
        self._inner = inner
        self._teacher = teacher

    def publish(self, policy_version: int) -> None:
        # First, so that a checkpoint is whole also where the weights do not reach the sampler.
        self._teacher.follow(policy_version)
        self._inner.publish(policy_version)
