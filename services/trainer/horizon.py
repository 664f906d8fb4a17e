"""How many leading positions of a response the teacher's signal trains: longer while the teacher is reliable there.

Far into a student's response a teacher sees text it would never have written, and what it says of the next token is
worth less (6.1, Figs 13 and 23: overlap falls from the back). How far it can be trusted is measured, not known: the
overlap ratio (eq 6) at the end of what is trained, compared with that of its beginning. R response tokens, k top-k ids.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from services.trainer.batch import ScoredRollout
from services.trainer.diagnostics.means import Mean, joined, mean_of
from services.trainer.diagnostics.overlap import overlap_of, overlap_ratio
from services.trainer.objectives.config import HorizonConfig

LENGTH, RELIABILITY = "horizon/length", "horizon/reliability"
Gather = Callable[[Any], list[Any]]
"""A JSON value of everybody who has rollouts of a step; see `Ranks.gather`."""


def next_horizon(length: int, reliability: float | None, config: HorizonConfig, *, longest: int) -> int:
    """The rule: longer where reliable, shorter where not, and as it is in between or where it could not be judged."""
    if reliability is None:
        return length
    if reliability >= config.reliable_at:
        return min(longest, math.ceil(length * config.growth))
    if reliability < config.unreliable_below:
        return max(min(config.start, length), math.floor(length / config.growth))
    return length


def _alone(value: Any) -> list[Any]:
    return [value]


def reliability_at(
    scored: Sequence[ScoredRollout], length: int, *, min_positions: int, gather: Gather = _alone
) -> float | None:
    """Overlap ratio of the last quarter of `length` positions over that of the first; None where it has too few.

    Rollouts are joined one by one, so that the result does not depend on who has which.
    """
    quarter = max(1, length // 4)
    ratios = [_ratios(item) for item in scored]
    ends = [[_told(item[:quarter]), _told(item[length - quarter : length])] for item in ratios]
    rollouts = [rollout for of_one in gather(ends) for rollout in of_one]
    front, back = (joined(Mean(total=ends[end][0], count=ends[end][1]) for ends in rollouts) for end in (0, 1))
    if back.count < min_positions or not front.total:
        return None
    return back.value / front.value


class Horizon:
    """The length now in force; `observe` a step to move it."""

    def __init__(self, config: HorizonConfig, *, longest: int, records: Sequence[Mapping[str, Any]] = ()) -> None:
        """`longest` response tokens are possible; `records` are the metrics of the steps of a run that is resumed."""
        self._config = config
        self._longest = longest
        self.length = min(config.start, longest)
        known = [record for record in records if LENGTH in record]
        if known:
            self._move(int(known[-1][LENGTH]), known[-1].get(RELIABILITY))

    def observe(self, scored: Sequence[ScoredRollout], gather: Gather = _alone) -> dict[str, Mean]:
        """The metrics of a step trained with this length, after which the length may be another.

        `gather` gets what others saw who have rollouts of it, so that all come to the same; then it is collective.
        """
        length = self.length
        reliability = reliability_at(scored, length, min_positions=self._config.min_positions, gather=gather)
        self._move(length, reliability)
        metrics = {LENGTH: Mean(total=length, count=1)}
        return metrics if reliability is None else metrics | {RELIABILITY: Mean(total=reliability, count=1)}

    def shorten(self, alarmed: Sequence[Mapping[str, Any]]) -> None:
        """At most half of the shortest length in `alarmed`, the metrics of steps with an alarm about the back.

        It may be below the start. Called after each step, so that it may not grow beyond before the alarms are over.
        """
        halves = [max(1, int(record[LENGTH]) // 2) for record in alarmed if LENGTH in record]
        self.length = min([self.length, *halves])

    def _move(self, length: int, reliability: float | None) -> None:
        self.length = next_horizon(length, reliability, self._config, longest=self._longest)


def _told(ratios: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """Sum and count."""
    mean = mean_of(ratios)
    return [mean.total, mean.count]


def _ratios(item: ScoredRollout) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[R], or [0] without the teacher's top-k."""
    ids, logprobs = item.scores.topk_token_ids, item.scores.topk_logprobs
    if ids is None or logprobs is None:
        return np.empty(0)
    rollout = item.rollout
    return overlap_ratio(overlap_of(rollout.topk_token_ids, rollout.topk_logprobs, ids, logprobs))
