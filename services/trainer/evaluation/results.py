"""What an evaluation finds: graded samples and their summary, as records, as JSON and as a table.

avg@n is the mean over problems of the share of right samples. Shares of samples (truncated, without an answer in the
template's form) are over all samples.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from services.trainer.evaluation.estimates import Estimate, GapRecovery, mean_over_problems, pass_at_k


@dataclass(frozen=True, kw_only=True, slots=True)
class GradedSample:
    """One response to one problem."""

    problem: int
    """Position of the problem in the evaluated list."""
    sample: int
    is_correct: bool
    extracted: str | None
    """The answer as written; None when there is none in the template's form."""
    num_tokens: int
    is_truncated: bool
    response: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Numbers of one set of problems, or of one of its parts."""

    num_problems: int
    num_samples: int
    """Per problem."""
    accuracy: Estimate
    """avg@n."""
    pass_at_k: dict[int, float]
    solve_all: float
    """Share of problems of which every sample is right."""
    solve_none: float
    truncated: float
    format_errors: float
    """Share of samples without an answer in the template's form."""
    mean_tokens: float
    """Of a response."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """One model on one set of problems."""

    model: str
    fingerprint: str
    data: str
    sampling: dict[str, float | int]
    total: Summary
    by_source: dict[str, Summary]
    by_level: dict[str, Summary]
    accuracy_by_problem: tuple[float, ...]
    """In the order of the problems; pairs up with another model's on the same data."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite becomes null."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)
        return plain


def summarize(samples_by_problem: Sequence[Sequence[GradedSample]], *, seed: int = 0) -> Summary:
    """Summary of problems with equally many samples each; at least one of either."""
    num_samples = len(samples_by_problem[0])
    if any(len(samples) != num_samples for samples in samples_by_problem):
        raise ValueError("problems have different numbers of samples")
    samples = [sample for problem in samples_by_problem for sample in problem]
    correct_P = np.array([sum(sample.is_correct for sample in problem) for problem in samples_by_problem])
    return Summary(
        num_problems=len(samples_by_problem),
        num_samples=num_samples,
        accuracy=mean_over_problems(correct_P / num_samples, seed=seed),
        pass_at_k={k: _mean_pass_at_k(num_samples, correct_P.tolist(), k) for k in _powers_of_two(num_samples)},
        solve_all=float((correct_P == num_samples).mean()),
        solve_none=float((correct_P == 0).mean()),
        truncated=float(np.mean([sample.is_truncated for sample in samples])),
        format_errors=float(np.mean([sample.extracted is None for sample in samples])),
        mean_tokens=float(np.mean([sample.num_tokens for sample in samples])),
    )


def _mean_pass_at_k(num_samples: int, correct: Sequence[int], k: int) -> float:
    return math.fsum(pass_at_k(num_samples, count, k) for count in correct) / len(correct)


def _powers_of_two(num_samples: int) -> list[int]:
    return [1 << exponent for exponent in range(num_samples.bit_length())]


def results_tables(results: Sequence[EvaluationResult]) -> list[Table]:
    """One table a model, one line a set, parts of a set below it; fits a terminal of 80 columns."""
    models = dict.fromkeys(result.model for result in results)
    return [_table(model, [result for result in results if result.model == model]) for model in models]


def _table(model: str, results: Sequence[EvaluationResult]) -> Table:
    total = results[0].total
    table = Table(title=model, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("set")
    samples, most = f"avg@{total.num_samples}", f"pass@{max(total.pass_at_k)}"
    for name in ("n", samples, "95 %", most, "all", "none", "cut off", "no form", "tokens"):
        table.add_column(name, justify="right")
    for result in results:
        _add_line(table, result.data, result.total)
        by_level = {f"level {name}": summary for name, summary in result.by_level.items()}
        # A set whose sources are its levels says everything once.
        is_same = list(result.by_source.values()) == list(by_level.values())
        for parts in (result.by_source, {} if is_same else by_level):
            if len(parts) > 1:
                for name, summary in parts.items():
                    _add_line(table, f"  {name.rpartition('/')[2]}", summary)
    return table


def _add_line(table: Table, name: str, summary: Summary) -> None:
    accuracy = summary.accuracy
    shares = (summary.solve_all, summary.solve_none, summary.truncated, summary.format_errors)
    table.add_row(
        name,
        str(summary.num_problems),
        f"{accuracy.value:.1%}",
        f"{100 * accuracy.low:.0f}-{100 * accuracy.high:.0f}",
        f"{max(summary.pass_at_k.items())[1]:.1%}",
        *(f"{share:.0%}" for share in shares),
        f"{summary.mean_tokens:.0f}",
    )


def recovery_line(model: str, data: str, recovery: GapRecovery) -> str:
    """One line for people; says why there is no number where there is none."""
    gap = f"gap {recovery.gap:.1%}, standard error {recovery.gap_standard_error:.1%}"
    if recovery.estimate is None:
        return f"{model} on {data}: no gap recovery ({gap}: not two standard errors above zero)"
    estimate = recovery.estimate
    return f"{model} on {data}: gap recovery {estimate.value:.1%}, {estimate.low:.1%} to {estimate.high:.1%} ({gap})"


def recovery_json(recovery: GapRecovery) -> dict[str, Any]:
    plain = _plain(asdict(recovery))
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any) -> Any:
    """JSON has neither infinities nor tuples nor keys that are numbers."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
