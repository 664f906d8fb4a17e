"""How many leading positions of a response the teacher's signal trains: longer while the teacher is reliable there.

Far into a student's response a teacher sees text it would never have written, and what it says of the next token is
worth less (6.1, Figs 13 and 23: overlap falls from the back). How far it can be trusted is measured, not known: the
overlap ratio (eq 6) at the end of what is trained, compared with that of its beginning. R response tokens, k top-k ids.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from services.trainer.batch import ScoredRollout
from services.trainer.diagnostics.means import Mean, joined, mean_of
from services.trainer.diagnostics.overlap import overlap_of, overlap_ratio
from services.trainer.objectives.config import HorizonConfig

LENGTH, RELIABILITY = "horizon/length", "horizon/reliability"


def next_horizon(length: int, reliability: float | None, config: HorizonConfig, *, longest: int) -> int:
    """The rule: longer where reliable, shorter where not, and as it is in between or where it could not be judged."""
    if reliability is None:
        return length
    if reliability >= config.reliable_at:
        return min(longest, math.ceil(length * config.growth))
    if reliability < config.unreliable_below:
        return max(min(config.start, length), math.floor(length / config.growth))
    return length


def reliability_at(scored: Sequence[ScoredRollout], length: int, *, min_positions: int) -> float | None:
    """Overlap ratio of the last quarter of `length` positions over that of the first; None where it has too few."""
    quarter = max(1, length // 4)
    front, back = _overlap(scored, 0, quarter), _overlap(scored, length - quarter, length)
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

    def observe(self, scored: Sequence[ScoredRollout]) -> dict[str, Mean]:
        """The metrics of a step trained with this length, after which the length may be another."""
        length = self.length
        reliability = reliability_at(scored, length, min_positions=self._config.min_positions)
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


def _overlap(scored: Sequence[ScoredRollout], start: int, stop: int) -> Mean:
    """The mean overlap ratio over positions `start` to `stop` of all rollouts."""
    return joined(mean_of(_ratios(item)[start:stop]) for item in scored)


def _ratios(item: ScoredRollout) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[R], or [0] without the teacher's top-k."""
    ids, logprobs = item.scores.topk_token_ids, item.scores.topk_logprobs
    if ids is None or logprobs is None:
        return np.empty(0)
    rollout = item.rollout
    return overlap_ratio(overlap_of(rollout.topk_token_ids, rollout.topk_logprobs, ids, logprobs))
