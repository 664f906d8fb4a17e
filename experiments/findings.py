"""What an experiment has measured: the numbers that its claims are judged from and its figure is drawn from.

Everything comes from, and goes to, plain JSON, so that claims and figures can be made again without a run. S seeds, P
problems.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from statistics import fmean
from typing import Any

import numpy as np

from experiments import estimates
from experiments.estimates import Values
from opd.errors import InternalError
from services.trainer.evaluation.estimates import Estimate

METRICS = (
    "distill/empty_overlap_fraction", "distill/entropy_gap", "distill/entropy_student", "distill/entropy_teacher",
    "distill/extreme_prob_gap_abs", "distill/mass99_overlap", "distill/overlap_advantage",
    "distill/overlap_mass_student", "distill/overlap_mass_teacher", "distill/overlap_ratio", "loss/objective",
    "loss/reverse_kl", "optim/grad_norm", "outcome/accuracy", "outcome/auroc", "rollout/response_length",
    "rollout/truncated_fraction",
)  # fmt: skip
"""Of every step; one that a run does not have is absent."""
BY_POSITION = ("distill/entropy_student", "distill/entropy_teacher", "distill/overlap_ratio")
EDGES = "distill/position_edges"
SMOOTHED_STEPS = 5
"""A single step is a few rollouts; what is said of every step is judged by means of so many in a row."""
_DIGITS = 6


class Window(Enum):
    """Steps that a training metric is averaged over."""

    FIRST = slice(0, 3)
    MIDDLE = slice(8, 13)
    LAST = slice(-5, None)
    ALL = slice(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One seed of an arm."""

    seed: int
    key: str
    steps: list[int]
    series: dict[str, list[float | None]]
    """One value a step; None where the step has none."""
    by_position: dict[str, dict[str, list[list[float | None]]]]
    """Metric -> "first" and "last" -> for each step of that window, one value per bucket of positions."""
    position_edges: list[float]
    """Where each bucket starts."""
    accuracy_by_problem: list[float]
    """[P], of the trained student."""
    accuracy_by_level: dict[str, float]

    def window(self, metric: str, window: Window) -> list[float]:
        """The values of the window's steps that have one."""
        return [value for value in self.series.get(metric, [])[window.value] if value is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmFindings:
    """One arm with all its seeds."""

    student: str
    teacher: str | None
    settings: dict[str, Any]
    """What it has beyond the base."""
    runs: list[Run]
    before_by_problem: list[float]
    """[P], of the student it began with."""
    teacher_by_problem: list[float] | None
    """None where there is no teacher."""
    evaluation_keys: list[str]
    """Of the student before, the teacher, if any, and every run: what was graded, and how."""

    @property
    def after_SP(self) -> Values:
        return np.array([run.accuracy_by_problem for run in self.runs])

    @property
    def before_SP(self) -> Values:
        return np.array([self.before_by_problem])

    @property
    def teacher_SP(self) -> Values:
        """`InternalError` for an arm that has no teacher."""
        if self.teacher_by_problem is None:
            raise InternalError(f"an arm of {self.student} without a teacher was asked for its teacher's accuracy")
        return np.array([self.teacher_by_problem])

    def metric(self, name: str, window: Window) -> Estimate | None:
        """Mean over the window: over seeds, or over steps where there is one seed."""
        return estimates.mean_of(self._units(name, window))

    def change(self, name: str, start: Window = Window.FIRST, end: Window = Window.LAST) -> Estimate | None:
        """End minus start of each seed; of one seed, of the two windows' steps."""
        return self.difference(self, name, end, start)

    def changes(self, name: str) -> list[float]:
        """Last minus first window of every seed that has both."""
        ends = [(run.window(name, Window.FIRST), run.window(name, Window.LAST)) for run in self.runs]
        return [float(np.mean(last) - np.mean(first)) for first, last in ends if first and last]

    def difference(
        self, other: "ArmFindings", name: str, window: Window, other_window: Window | None = None
    ) -> Estimate | None:
        """This arm minus the other. Runs of equal seeds are paired: they were asked the same prompts."""
        mine, others = self._units(name, window), other._units(name, other_window or window)
        seeds = [run.seed for run in self.runs]
        if len(seeds) > 1 and seeds == [run.seed for run in other.runs] and len(mine) == len(others):
            return estimates.mean_of([a - b for a, b in zip(mine, others, strict=True)])
        return estimates.difference_of(mine, others)

    def largest_gap(self, other: "ArmFindings", name: str, num_steps: int) -> Estimate | None:
        """Largest distance of the curves, each the mean of `num_steps` steps in a row, over the steps both have.

        Every place has an interval over its steps, which are paired: value and lower bound are those of the widest
        place, the upper bound is the largest of all, so that it is below a limit only where the curves are everywhere.
        """
        gaps = self._step_gaps(other, name)
        places = [estimates.mean_of(gaps[start : start + num_steps]) for start in range(len(gaps) - num_steps + 1)]
        found = [estimates.distance_of(place) for place in places if place is not None]
        if not found:
            return None
        widest = max(found, key=lambda place: place.value)
        return Estimate(value=widest.value, low=widest.low, high=max(place.high for place in found))

    def extreme(self, name: str, *, steps: slice = slice(None)) -> list[float]:
        """The largest value of each seed."""
        known = [[value for value in run.series.get(name, [])[steps] if value is not None] for run in self.runs]
        return [max(values) for values in known if values]

    def lowest(self, name: str) -> list[float]:
        """The smallest mean of `SMOOTHED_STEPS` steps in a row, of each seed that has so many."""
        known = [run.window(name, Window.ALL) for run in self.runs]
        return [
            min(fmean(values[start : start + SMOOTHED_STEPS]) for start in range(len(values) - SMOOTHED_STEPS + 1))
            for values in known
            if len(values) >= SMOOTHED_STEPS
        ]

    def back_minus_front(self, name: str, window: Window) -> list[float]:
        """Last known bucket of positions minus the first, of every step of the window in the first seed."""
        rows = self.runs[0].by_position.get(name, {}).get(window.name.lower(), [])
        known = [[value for value in row if value is not None] for row in rows]
        return [values[-1] - values[0] for values in known if len(values) > 1]

    def gain(self) -> Estimate:
        """Accuracy after minus before."""
        return estimates.of_accuracies(lambda after, before: after - before, self.after_SP, self.before_SP)

    def accuracy(self) -> Estimate:
        return estimates.of_accuracies(lambda after: after, self.after_SP)

    def before(self) -> Estimate:
        return estimates.of_accuracies(lambda before: before, self.before_SP)

    def before_over(self, other: "ArmFindings") -> Estimate:
        """Accuracy before training, this arm's student minus the other's."""
        return estimates.of_accuracies(lambda mine, others: mine - others, self.before_SP, other.before_SP)

    def teacher_lead(self) -> Estimate:
        """Accuracy of the teacher minus the student's before."""
        return estimates.of_accuracies(lambda teacher, before: teacher - before, self.teacher_SP, self.before_SP)

    def recovery(self) -> Estimate | None:
        """The share of the gap to the teacher that has closed."""
        return estimates.recovery(self.before_SP, self.after_SP, self.teacher_SP)

    def recovery_over(self, other: "ArmFindings") -> Estimate | None:
        """The share that has closed, this arm minus the other."""
        mine, others = ((arm.before_SP, arm.after_SP, arm.teacher_SP) for arm in (self, other))
        return estimates.recovery_difference(mine, others)

    def accuracy_over(self, other: "ArmFindings") -> Estimate:
        """Accuracy after training, this arm minus the other."""
        return estimates.of_accuracies(lambda mine, others: mine - others, self.after_SP, other.after_SP)

    def _step_gaps(self, other: "ArmFindings", name: str) -> list[float]:
        """This arm's mean over seeds minus the other's, of every step at which all seeds of both have a value."""
        mine, others = ([run.series.get(name, []) for run in arm.runs] for arm in (self, other))
        steps = zip(*mine, *others, strict=False)
        known = [values for step in steps if len(values := [v for v in step if v is not None]) == len(step)]
        return [fmean(values[: len(mine)]) - fmean(values[len(mine) :]) for values in known]

    def _units(self, name: str, window: Window) -> list[float]:
        found = [values for run in self.runs if (values := run.window(name, window))]
        if len(self.runs) == 1:
            return found[0] if found else []
        return [float(np.mean(values)) for values in found]


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """Everything of one experiment."""

    arms: dict[str, ArmFindings]
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By label, the JSON report of each command that makes one."""
    report_keys: dict[str, str] = field(default_factory=dict)
    """By label, the key of that command."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def findings_of(plain: Mapping[str, Any]) -> Findings:
    """Back from JSON."""
    arms = {
        label: ArmFindings(**{**arm, "runs": [Run(**run) for run in arm["runs"]]})
        for label, arm in plain["arms"].items()
    }
    return Findings(arms=arms, reports=dict(plain["reports"]), report_keys=dict(plain["report_keys"]))


def run_of(seed: int, key: str, records: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> Run:
    """A run from the lines of its `metrics.jsonl` and the JSON of its evaluation."""
    known = [name for name in METRICS if any(name in record for record in records)]
    return Run(
        seed=seed,
        key=key,
        steps=[record["step"] for record in records],
        series={name: [_rounded(record.get(name)) for record in records] for name in known},
        by_position=_by_position(records),
        position_edges=next((record[EDGES] for record in records if EDGES in record), []),
        accuracy_by_problem=list(evaluation["accuracy_by_problem"]),
        accuracy_by_level={name: part["accuracy"]["value"] for name, part in evaluation["by_level"].items()},
    )


def _by_position(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[list[float | None]]]]:
    return {
        name: {
            window.name.lower(): [
                [_rounded(value) for value in record[f"{name}/by_position"]]
                for record in records[window.value]
                if f"{name}/by_position" in record
            ]
            for window in (Window.FIRST, Window.LAST)
        }
        for name in BY_POSITION
        if any(f"{name}/by_position" in record for record in records)
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
