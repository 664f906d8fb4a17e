"""What an evaluation finds: graded samples and their summary, as records, as JSON and as a table.

avg@n is the mean over problems of the share of right samples. Every number is a mean over problems and has an interval
that resamples problems.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from services.trainer.evaluation.estimates import Estimate, GapRecovery, means_over_problems, pass_at_k

_MAX_PASS_COLUMNS = 5


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
    pass_at_k: dict[int, Estimate]
    """Chance that one of k samples is right, by the unbiased estimator; k = 1, 2, 4, ... up to n."""
    solve_all: Estimate
    """Share of problems of which every sample is right."""
    solve_none: Estimate
    truncated: Estimate
    """Share of samples cut off by the length limit."""
    format_errors: Estimate
    """Share of samples without an answer in the template's form."""
    mean_tokens: Estimate
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
        return as_plain_json(self)


def summarize(samples_by_problem: Sequence[Sequence[GradedSample]], *, seed: int = 0) -> Summary:
    """Summary of problems with equally many samples each; at least one of either."""
    num_samples = len(samples_by_problem[0])
    if any(len(samples) != num_samples for samples in samples_by_problem):
        raise ValueError("problems have different numbers of samples")
    ks = _powers_of_two(num_samples)
    columns = np.array([_problem_values(samples, ks) for samples in samples_by_problem], np.float64)
    accuracy, solve_all, solve_none, truncated, format_errors, mean_tokens, *passes = means_over_problems(
        columns, seed=seed
    )
    return Summary(
        num_problems=len(samples_by_problem),
        num_samples=num_samples,
        accuracy=accuracy,
        pass_at_k=dict(zip(ks, passes, strict=True)),
        solve_all=solve_all,
        solve_none=solve_none,
        truncated=truncated,
        format_errors=format_errors,
        mean_tokens=mean_tokens,
    )


def _problem_values(samples: Sequence[GradedSample], ks: Sequence[int]) -> list[float]:
    """One problem's part in every number of a summary, in the order `summarize` unpacks them."""
    num_samples, num_correct = len(samples), sum(sample.is_correct for sample in samples)
    return [
        num_correct / num_samples,
        float(num_correct == num_samples),
        float(num_correct == 0),
        sum(sample.is_truncated for sample in samples) / num_samples,
        sum(sample.extracted is None for sample in samples) / num_samples,
        sum(sample.num_tokens for sample in samples) / num_samples,
        *(pass_at_k(num_samples, num_correct, k) for k in ks),
    ]


def _powers_of_two(num_samples: int) -> list[int]:
    return [1 << exponent for exponent in range(num_samples.bit_length())]


def results_tables(results: Sequence[EvaluationResult]) -> list[Table]:
    """Two tables a model, one line a set, parts of a set below it; each fits a terminal of 80 columns."""
    by_model: dict[str, list[EvaluationResult]] = {}
    for result in results:
        by_model.setdefault(result.model, []).append(result)
    return [build(model, found) for model, found in by_model.items() for build in (_table, _pass_table)]


def plain_table(title: str, first: str, others: Sequence[str]) -> Table:
    """An empty table of a name and numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="ellipsis", no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def percent_range(estimate: Estimate) -> str:
    """Its interval. Example: `41-75` for 0.41 to 0.75."""
    return f"{100 * estimate.low:.0f}-{100 * estimate.high:.0f}"


def _table(model: str, results: Sequence[EvaluationResult]) -> Table:
    total = results[0].total
    samples, most = f"avg@{total.num_samples}", f"pass@{max(total.pass_at_k)}"
    table = plain_table(model, "set", ("n", samples, "95 %", most, "all", "none", "cut off", "no form", "tokens"))
    for name, summary in _lines(results):
        shares = (summary.solve_all, summary.solve_none, summary.truncated, summary.format_errors)
        table.add_row(
            name,
            str(summary.num_problems),
            f"{summary.accuracy.value:.1%}",
            percent_range(summary.accuracy),
            f"{summary.pass_at_k[max(summary.pass_at_k)].value:.1%}",
            *(f"{share.value:.0%}" for share in shares),
            f"{summary.mean_tokens.value:.0f}",
        )
    return table


def _pass_table(model: str, results: Sequence[EvaluationResult]) -> Table:
    """As many k as fit, beginning with the smallest and ending with the largest."""
    ks = list(results[0].total.pass_at_k)
    ks = [*ks[: _MAX_PASS_COLUMNS - 1], ks[-1]] if len(ks) > _MAX_PASS_COLUMNS else ks
    table = plain_table("", "chance in %", [f"pass@{k}" for k in ks])
    for name, summary in _lines(results):
        chances = [summary.pass_at_k[k] for k in ks]
        table.add_row(name, *(f"{100 * chance.value:.0f} {percent_range(chance)}" for chance in chances))
    return table


def _lines(results: Sequence[EvaluationResult]) -> Iterator[tuple[str, Summary]]:
    """Every set by name, followed by its parts, indented."""
    for result in results:
        yield result.data, result.total
        by_level = {f"level {name}": summary for name, summary in result.by_level.items()}
        # A set whose sources are its levels says everything once.
        is_same = list(result.by_source.values()) == list(by_level.values())
        for parts in (result.by_source, {} if is_same else by_level):
            if len(parts) > 1:
                yield from ((f"  {name.rpartition('/')[2]}", summary) for name, summary in parts.items())


def recovery_line(model: str, data: str, recovery: GapRecovery) -> str:
    """One line for people; says why there is no number where there is none."""
    gap = f"gap {recovery.gap:.1%}"
    if recovery.gap_standard_error is not None:
        gap += f", standard error {recovery.gap_standard_error:.1%}"
    if recovery.estimate is None:
        return f"{model} on {data}: no gap recovery ({gap}: {recovery.reason})"
    estimate = recovery.estimate
    return f"{model} on {data}: gap recovery {estimate.value:.1%}, {estimate.low:.1%} to {estimate.high:.1%} ({gap})"


def as_plain_json(record: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values; what is not finite becomes null."""
    plain = _plain(asdict(record))
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any) -> Any:
    """JSON has neither infinities nor tuples nor keys that are numbers."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
