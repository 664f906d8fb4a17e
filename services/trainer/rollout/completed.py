"""A rollout engine in front of another: what the one behind does not record, the student says, before anybody is told.

For engines that give tokens alone, or log-probs without entropies. The pass runs in the thread that samples, with the
weights that sampled: they change between calls only.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from opd.types import Rollout
from services.trainer.rollout.base import RolloutEngine, RolloutRequest, SamplingParams
from services.trainer.support_pass import SupportPass, measured_places


class CompletedRollouts:
    """A `RolloutEngine`. `completing` says what is wanted; temperature and cuts are those of each call's sampling."""

    def __init__(self, engine: RolloutEngine, completing: SupportPass, *, fraction: float = 1.0, seed: int = 0) -> None:
        """`fraction` of each call's rollouts, at least one, lack nothing: where nothing is lost or sampled ahead, the
        same that `StepMetrics` measures by this seed. Of several ranks each completes and measures a fraction of
        its own rollouts. Where the loss needs the sampler's log-probs, it has to be 1."""
        self._engine = engine
        self._completing = completing
        self._fraction = fraction
        self._seed = seed

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        self._engine.policy_version = version

    @property
    def samples_elsewhere(self) -> bool:
        return self._engine.samples_elsewhere

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
        completing = replace(
            self._completing,
            temperature=sampling.temperature or 1.0,
            keeps_every_token=sampling.top_p == 1.0 and sampling.top_k == -1,
        )
        # Metrics count completed steps, so the one that these are for is still to be added.
        step = self.policy_version + 1
        places = measured_places(len(requests), fraction=self._fraction, seed=self._seed, step=step)
        measured = {request.rollout_id for place, request in enumerate(requests) if place in places}
        completed: dict[str, Rollout] = {}

        def finish(rollout: Rollout) -> None:
            (completed[rollout.rollout_id],) = completing.complete([rollout], measured)
            if on_finish is not None:
                on_finish(completed[rollout.rollout_id])

        rollouts = self._engine.sample(requests, sampling, on_finish=finish)
        return [completed[rollout.rollout_id] for rollout in rollouts]
