"""New weights to as many rollout engines as there are ranks: each has one of its own, and all go on or none does."""

import math
from collections.abc import Callable
from typing import Any

from opd.errors import OpdError
from services.trainer.distributed.ranks import Ranks, known_error, together
from services.trainer.distributed.sharding import gathered
from services.trainer.weights import WeightPublisher


class PublishedByAll:
    """A `WeightPublisher` that has every rank publish whole weights with its own `weights`; collective."""

    def __init__(self, weights: WeightPublisher, model: Any, ranks: Ranks) -> None:
        """`weights` are of engines that have a copy; those that share the model's weights need no other rank."""
        self._weights = weights
        self._model = model
        self._ranks = ranks

    def publish(self, policy_version: int) -> None:
        """See `WeightPublisher.publish`. What keeps one rank from it is an error of all, and always an `OpdError`:
        the step is taken, so all have to go on from here alike. What fails in gathering leaves the others for good."""
        with gathered(self._model, self._ranks), together(self._ranks):
            try:
                self._weights.publish(policy_version)
            except OpdError:
                raise
            except Exception as error:
                raise known_error(error) from error


def worst_of_all(ranks: Ranks, measure: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
    """The largest of each number over all ranks, NaN before any; collective."""

    def measure_all() -> dict[str, float]:
        of_ranks = ranks.gather(measure())
        return {name: _worst([of_rank[name] for of_rank in of_ranks]) for name in of_ranks[0]}

    return measure_all


def _worst(values: list[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)
