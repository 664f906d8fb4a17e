"""Estimates from graded samples, each with an interval over problems.

Legend: P problems, N samples a problem, C columns, R rollouts, B resamples. The unit of chance is the problem: samples
of one problem say little about the next, so intervals resample problems (percentile bootstrap, seeded), never samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
_MIN_GAP_STANDARD_ERRORS = 2.0
_MAX_CHUNK_INDICES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A value with its 95 % interval. Example: ``Estimate(value=0.5, low=0.4, high=0.61)``."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GapRecovery:
    """How much of the gap between student and teacher training has closed, 1 being all of it."""

    estimate: Estimate | None
    """None when the gap is negative, under two standard errors, or of one problem: a ratio to it would mean nothing."""
    gap: float
    """acc_teacher - acc_before."""
    gap_standard_error: float | None
    """Over problems; None for one problem, which has no spread to tell it from."""
    reason: str = ""
    """Why there is no estimate."""


def mean_over_problems(values_P: Values, *, seed: int = 0) -> Estimate:
    """The mean with its interval; with one problem the interval is the value."""
    return means_over_problems(values_P[:, None], seed=seed)[0]


def means_over_problems(values_PC: Values, *, seed: int = 0) -> list[Estimate]:
    """The mean of every column with its interval, all from the same resamples."""
    bounds_2C = np.quantile(_resampled_means(values_PC, seed), tails(), axis=0)
    return [
        Estimate(value=float(value), low=float(low), high=float(high))
        for value, low, high in zip(values_PC.mean(axis=0), *bounds_2C, strict=True)
    ]


def means_over_rollouts(values_RC: Values, problem_R: Sequence[int], *, seed: int = 0) -> list[Estimate]:
    """The mean of every column over all rollouts, with an interval that resamples whole problems.

    Problems may have different numbers of rollouts: each resample's mean is over the rollouts it drew.
    """
    _, place_R = np.unique(np.asarray(problem_R), return_inverse=True)
    sums_PC = np.zeros((int(place_R.max()) + 1, values_RC.shape[1] + 1))
    np.add.at(sums_PC, place_R, np.concatenate([values_RC, np.ones((len(values_RC), 1))], axis=1))
    means_BC = _resampled_means(sums_PC, seed)
    bounds_2C = np.quantile(means_BC[:, :-1] / means_BC[:, -1:], tails(), axis=0)
    return [
        Estimate(value=float(value), low=float(low), high=float(high))
        for value, low, high in zip(values_RC.mean(axis=0), *bounds_2C, strict=True)
    ]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of k samples is right: 1 - C(N-c, k) / C(N, k), unbiased; 1 <= k <= num_samples."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k} is outside 1..{num_samples}, the number of samples")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def gap_recovery(before_P: Values, after_P: Values, teacher_P: Values, *, seed: int = 0) -> GapRecovery:
    """(after - before) / (teacher - before) of accuracies on the same P problems, resampled together.

    Resamples whose gap is not positive count as infinite, with the sign of their gain, so the interval widens
    where the gap is hardly there; a bound may therefore be infinite. From one problem there is no interval.
    """
    if not before_P.shape == after_P.shape == teacher_P.shape:
        raise ValueError(f"accuracies of {before_P.size}, {after_P.size} and {teacher_P.size} problems do not pair up")
    gains, gaps = _resampled_means(np.stack([after_P - before_P, teacher_P - before_P], axis=1), seed).T
    gap, standard_error = float((teacher_P - before_P).mean()), float(gaps.std(ddof=1))
    if before_P.size == 1:
        return GapRecovery(estimate=None, gap=gap, gap_standard_error=None, reason="one problem has no spread")
    if gap <= 0 or gap < _MIN_GAP_STANDARD_ERRORS * standard_error:
        reason = "not two standard errors above zero"
        return GapRecovery(estimate=None, gap=gap, gap_standard_error=standard_error, reason=reason)
    low, high = np.quantile(shares_of_gaps(gains, gaps), tails(), method="inverted_cdf")
    value = float((after_P - before_P).mean()) / gap
    estimate = Estimate(value=value, low=float(low), high=float(high))
    return GapRecovery(estimate=estimate, gap=gap, gap_standard_error=standard_error)


def shares_of_gaps(gains: Values, gaps: Values) -> Values:
    """gain / gap of every resample; infinite, with the sign of the gain, where the gap is not positive.

    Bounds of such shares are order statistics (``inverted_cdf``): nothing lies between a number and infinity.
    """
    unbounded = np.where(gains == 0, 0.0, np.copysign(np.inf, gains))
    return np.where(gaps > 0, gains / np.where(gaps > 0, gaps, 1.0), unbounded)


def resampled_counts(num_problems: int, seed: int) -> Values:
    """How often each problem is drawn, [NUM_RESAMPLES, P]; the resamples of every estimate of this module."""
    counts = [
        np.apply_along_axis(np.bincount, 1, drawn, minlength=num_problems) for drawn in _draws(num_problems, seed)
    ]
    return np.concatenate(counts).astype(np.float64)


def tails() -> tuple[float, float]:
    """The quantiles that bound an interval."""
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def _resampled_means(columns_PC: Values, seed: int) -> Values:
    """Column means of resampled problems, [NUM_RESAMPLES, C]; the same seed and P give the same resamples."""
    return np.concatenate([columns_PC[drawn].mean(axis=1) for drawn in _draws(columns_PC.shape[0], seed)])


def _draws(num_problems: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Problems drawn with replacement, [.., P], in chunks that bound the memory."""
    generator = np.random.default_rng([seed, num_problems])
    chunk = max(1, _MAX_CHUNK_INDICES // num_problems)
    for start in range(0, NUM_RESAMPLES, chunk):
        yield generator.integers(num_problems, size=(min(chunk, NUM_RESAMPLES - start), num_problems))
