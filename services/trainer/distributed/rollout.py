"""Sampling from a student in shards: each rank samples its own prompts from a whole copy it has for that long."""

from collections.abc import Callable, Sequence

from torch import nn

from opd.types import Rollout
from services.trainer.distributed.sharding import gathered
from services.trainer.rollout.base import RolloutEngine, RolloutRequest, SamplingParams


class GatheredEngine:
    """A `RolloutEngine` over one that shares the sharded student's module. `sample` is collective on entry."""

    def __init__(self, engine: RolloutEngine, model: nn.Module) -> None:
        self._engine = engine
        self._model = model

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        self._engine.policy_version = version

    @property
    def max_context(self) -> int:
        return self._engine.max_context

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        *,
        on_finish: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """See `RolloutEngine.sample`."""
        with gathered(self._model):
            return self._engine.sample(requests, sampling, on_finish=on_finish)
