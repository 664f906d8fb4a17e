"""Adds up a step's metrics over rollouts and micro-batches, in any order, and reduces them once.

Means are over positions for what is defined per position and over rollouts for what is defined per rollout, never over
micro-batches. A key is present exactly when something was measured under it.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.types import FinishReason, Mask, Rollout, Scores
from services.trainer.diagnostics.means import (
    POSITION_EDGES,
    BucketMeans,
    Mean,
    bucketed,
    joined,
    joined_buckets,
    mean_of,
)
from services.trainer.diagnostics.outcomes import auroc, teacher_reward
from services.trainer.diagnostics.positions import PositionScores, position_metrics, positions_of
from services.trainer.objectives.config import SupportWeight

BY_POSITION = (
    "distill/overlap_ratio",
    "distill/overlap_advantage",
    "distill/entropy_student",
    "distill/entropy_teacher",
    "distill/entropy_gap",
)
"""Also reported per bucket of positions, under `<key>/by_position` (Figs 13, 23)."""

BY_TEACHER = ("loss/reverse_kl", "distill/overlap_ratio")
"""Also reported per teacher where a run has several, under `<key>/teacher/<name>`."""

CORRECT_REWARDS, INCORRECT_REWARDS = "outcome/rewards_correct", "outcome/rewards_incorrect"
POSITION_EDGES_KEY = "distill/position_edges"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSummary:
    """A step in numbers, keys `area/name`."""

    values: dict[str, float]
    by_position: dict[str, BucketMeans]
    samples: dict[str, list[float]] = field(default_factory=dict)
    """One number per rollout, in rising order: what a mean does not tell of a distribution (Fig 14)."""

    @property
    def arrays(self) -> dict[str, list[float]]:
        """Flat arrays for metrics.jsonl: samples, `distill/position_edges`, `<key>/by_position` with its `/count`."""
        arrays: dict[str, list[float]] = dict(self.samples)
        for name, buckets in self.by_position.items():
            arrays[POSITION_EDGES_KEY] = [float(edge) for edge in buckets.edges]
            arrays[f"{name}/by_position"] = [mean.value for mean in buckets.means]
            arrays[f"{name}/by_position/count"] = [mean.count for mean in buckets.means]
        return arrays


class StepDiagnostics:
    """Collects one step: `add_rollout` per scored rollout, `add_means` per micro-batch of the loss, then `summary`."""

    def __init__(
        self, *, weight: SupportWeight = SupportWeight.STUDENT, position_edges: Sequence[int] = POSITION_EDGES
    ) -> None:
        self._weight = weight
        self._edges = tuple(position_edges)
        self._means: defaultdict[str, list[Mean]] = defaultdict(list)
        self._buckets: defaultdict[str, list[BucketMeans]] = defaultdict(list)
        self._judged: list[tuple[float, bool]] = []

    def add_rollout(
        self,
        rollout: Rollout,
        scores: Scores,
        *,
        is_correct: bool | None = None,
        scored_rows: Mask | None = None,
        with_costly: bool = True,
        teacher: str = "",
    ) -> None:
        """Adds a rollout's own numbers and those of its positions, the costly ones unless `with_costly` is False.

        `is_correct` is None where no answer is known; a named `teacher` has its own means beside all. Raises
        `NonFiniteError` for a score that is partly missing.
        """
        scored = positions_of(rollout, scores, scored_rows)
        self.add_positions(scored, teacher=teacher, with_costly=with_costly)
        self._add("rollout/response_length", float(rollout.response_token_ids.size))
        self._add("rollout/truncated_fraction", float(rollout.finish_reason is FinishReason.LENGTH))
        self._add_end(rollout, scored)
        student_T, teacher_T = scored.student_sampled_logprobs_T, scored.teacher_sampled_logprobs_T
        reward = math.nan if student_T is None or teacher_T is None else teacher_reward(student_T, teacher_T)
        if not math.isnan(reward):
            self._add("rollout/teacher_reward", reward)
        if is_correct is not None:
            self._add("outcome/accuracy", float(is_correct))
            if not math.isnan(reward):
                self._judged.append((reward, is_correct))
                self._add(f"outcome/teacher_reward_{'correct' if is_correct else 'incorrect'}", reward)

    def add_positions(self, scores: PositionScores, *, teacher: str = "", with_costly: bool = True) -> None:
        """Adds packed positions of any rollouts that have the teacher in common."""
        for name, values_T in position_metrics(scores, self._weight, with_costly=with_costly).items():
            self._add_position_metric(name, values_T, scores.positions_T)
            if teacher and name in BY_TEACHER:
                self._means[f"{name}/teacher/{teacher}"].append(mean_of(values_T[~np.isnan(values_T)]))

    def add_means(self, means: Mapping[str, Mean]) -> None:
        """Adds sums with their counts, such as the metrics of a `LossOutput`."""
        for name, mean in means.items():
            self._means[name].append(mean)

    def parts(self) -> dict[str, Any]:
        """Everything added so far as JSON, for `add_parts` in another process."""
        means = {name: joined(found) for name, found in self._means.items()}
        buckets = {name: joined_buckets(found) for name, found in self._buckets.items()}
        return {
            "means": {name: [mean.total, mean.count] for name, mean in means.items()},
            "buckets": {name: [[mean.total, mean.count] for mean in one.means] for name, one in buckets.items()},
            "judged": [[reward, is_correct] for reward, is_correct in self._judged],
        }

    def add_parts(self, parts: Mapping[str, Any]) -> None:
        """Adds what another process has found on rollouts of its own; both must have the same edges."""
        self.add_means({name: Mean(total=pair[0], count=pair[1]) for name, pair in parts["means"].items()})
        for name, pairs in parts["buckets"].items():
            means = tuple(Mean(total=total, count=count) for total, count in pairs)
            self._buckets[name].append(BucketMeans(edges=self._edges, means=means))
        self._judged += [(float(reward), bool(is_correct)) for reward, is_correct in parts["judged"]]

    def summary(self) -> StepSummary:
        """Everything added so far, reduced."""
        means = {name: joined(parts) for name, parts in self._means.items()}
        values = {name: mean.value for name, mean in sorted(means.items()) if mean.count}
        area = auroc([reward for reward, _ in self._judged], [is_correct for _, is_correct in self._judged])
        if area is not None:
            values["outcome/auroc"] = area
        buckets = {name: joined_buckets(parts) for name, parts in sorted(self._buckets.items())}
        return StepSummary(values=values, by_position=buckets, samples=self._rewards())

    def _rewards(self) -> dict[str, list[float]]:
        by_class = {
            name: sorted(reward for reward, is_correct in self._judged if is_correct is wanted)
            for name, wanted in ((CORRECT_REWARDS, True), (INCORRECT_REWARDS, False))
        }
        return {name: rewards for name, rewards in by_class.items() if rewards}

    def _add_end(self, rollout: Rollout, scored: PositionScores) -> None:
        """Both models' log-probs of the EOS that was sampled: far apart when they end their responses differently."""
        student_T, teacher_T = scored.student_sampled_logprobs_T, scored.teacher_sampled_logprobs_T
        has_end = scored.positions_T.size and scored.positions_T[-1] == rollout.response_token_ids.size - 1
        if rollout.finish_reason is not FinishReason.STOP or not has_end or student_T is None or teacher_T is None:
            return
        self._add("rollout/eos_logprob_student", float(student_T[-1]))
        self._add("rollout/eos_logprob_teacher", float(teacher_T[-1]))

    def _add(self, name: str, value: float) -> None:
        self._means[name].append(Mean(total=value, count=1.0))

    def _add_position_metric(self, name: str, values_T: NDArray[np.float64], positions_T: NDArray[np.integer]) -> None:
        defined_T = ~np.isnan(values_T)
        self._means[name].append(mean_of(values_T[defined_T]))
        if name in BY_POSITION:
            self._buckets[name].append(bucketed(values_T[defined_T], positions_T[defined_T], self._edges))
