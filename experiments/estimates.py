"""Numbers with 95 % intervals, and what the intervals are over.

S seeds, P problems, R resamples, N units. Accuracies vary with the problems asked and with the seed of the run, so both
are resampled. A training metric varies with the seed; where there is one seed, steps of the window stand in for it,
which says how noisy the window is and not how another run would end.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from services.trainer.diagnostics.outcomes import auroc
from services.trainer.evaluation.estimates import (
    NUM_RESAMPLES,
    Estimate,
    gap_recovery,
    shares_of_gaps,
    tails,
)

Values = NDArray[np.float64]

# Student's t at 97.5 % for 1 to 9 degrees of freedom; beyond that the last one, which is on the safe side.
_T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_NUM_AUROC_RESAMPLES = 500


def of_accuracies(combine: Callable[..., Values | float], *tables_SP: Values, seed: int = 0) -> Estimate:
    """`combine` of the tables' means, such as a difference; each table has S seeds of its own and the same P problems.

    Percentile bootstrap: problems are resampled together for all tables, seeds for each table by itself. `combine` is
    given one number per table, or one array [R] per table. A resample that is not a number could be anything and counts
    below and above all others; bounds may be infinite.
    """
    generator = np.random.default_rng([seed, *(size for table in tables_SP for size in table.shape)])
    num_problems = tables_SP[0].shape[1]
    problems_RP = generator.integers(num_problems, size=(NUM_RESAMPLES, num_problems))
    resampled = []
    for table_SP in tables_SP:
        means_RS = np.stack([row_P[problems_RP].mean(axis=1) for row_P in table_SP], axis=1)
        seeds_RS = generator.integers(table_SP.shape[0], size=means_RS.shape)
        resampled.append(np.take_along_axis(means_RS, seeds_RS, axis=1).mean(axis=1))
    combined_R = np.asarray(combine(*resampled))
    low, high = (
        np.quantile(np.where(np.isnan(combined_R), extreme, combined_R), tail, method="inverted_cdf")
        for tail, extreme in zip(tails(), (-np.inf, np.inf), strict=True)
    )
    value = combine(*(float(table.mean()) for table in tables_SP))
    return Estimate(value=float(value), low=float(low), high=float(high))


def recovery(before_SP: Values, after_SP: Values, teacher_SP: Values) -> Estimate | None:
    """(after - before) / (teacher - before); None where the gap is negative or under two standard errors."""
    if not _has_gap(before_SP, after_SP, teacher_SP):
        return None
    return of_accuracies(_share, before_SP, after_SP, teacher_SP)


def recovery_difference(first: Sequence[Values], second: Sequence[Values]) -> Estimate | None:
    """One recovery minus another, each of the tables before, after and teacher; None where either is None.

    A resample in which both are infinite alike says nothing of their difference, and widens the interval both ways.
    """
    if not (_has_gap(*first) and _has_gap(*second)):
        return None

    def difference(*means: Values) -> Values:
        with np.errstate(invalid="ignore"):
            return np.asarray(_share(*means[:3]) - _share(*means[3:]))

    return of_accuracies(difference, *first, *second)


def _has_gap(before_SP: Values, after_SP: Values, teacher_SP: Values) -> bool:
    means = (table_SP.mean(axis=0) for table_SP in (before_SP, after_SP, teacher_SP))
    return gap_recovery(*means).estimate is not None


def _share(before: Values, after: Values, teacher: Values) -> Values:
    return shares_of_gaps(np.asarray(after - before), np.asarray(teacher - before))


def of_aurocs(
    first_R: Sequence[float], second_R: Sequence[float], is_correct_R: Sequence[bool], problem_R: Sequence[int]
) -> Estimate | None:
    """AUROC of one teacher's rewards minus another's of the same rollouts; problems are resampled.

    None where all rollouts are right, or all wrong; resamples of which that is so are left out.
    """
    rewards_2R, correct_R = np.array([first_R, second_R], np.float64), np.asarray(is_correct_R, np.bool_)
    problems_R = np.asarray(problem_R)
    members = [np.flatnonzero(problems_R == problem) for problem in np.unique(problems_R)]

    def difference(chosen_R: NDArray[np.intp]) -> float | None:
        first, second = (auroc(row_R[chosen_R].tolist(), correct_R[chosen_R].tolist()) for row_R in rewards_2R)
        return None if first is None or second is None else first - second

    value = difference(np.arange(correct_R.size))
    if value is None:
        return None
    generator = np.random.default_rng(0)
    draws = (generator.integers(len(members), size=len(members)) for _ in range(_NUM_AUROC_RESAMPLES))
    found = [difference(np.concatenate([members[index] for index in draw])) for draw in draws]
    low, high = np.quantile([one for one in found if one is not None], tails())
    return Estimate(value=value, low=float(low), high=float(high))


def mean_of(units_N: Sequence[float]) -> Estimate | None:
    """The mean with Student's interval; None for no unit, and for one, which has no spread."""
    values_N = np.asarray(units_N, np.float64)
    if values_N.size < 2:
        return None
    half = _t(values_N.size - 1) * float(values_N.std(ddof=1)) / values_N.size**0.5
    return _around(float(values_N.mean()), half)


def difference_of(first_N: Sequence[float], second_N: Sequence[float]) -> Estimate | None:
    """Mean of `first` minus mean of `second`, of unpaired units (Welch); None where either has under two."""
    first, second = np.asarray(first_N, np.float64), np.asarray(second_N, np.float64)
    if min(first.size, second.size) < 2:
        return None
    variance = first.var(ddof=1) / first.size + second.var(ddof=1) / second.size
    # The smaller sample's degrees of freedom are a lower bound of Welch's.
    half = _t(min(first.size, second.size) - 1) * float(variance) ** 0.5
    return _around(float(first.mean() - second.mean()), half)


def distance_of(difference: Estimate) -> Estimate:
    """How far from 0: the absolute value, and the nearest and furthest that the interval reaches."""
    ends = sorted((abs(difference.low), abs(difference.high)))
    low = 0.0 if difference.low <= 0 <= difference.high else ends[0]
    return Estimate(value=abs(difference.value), low=low, high=ends[1])


def _t(degrees_of_freedom: int) -> float:
    return _T_QUANTILES[min(degrees_of_freedom, len(_T_QUANTILES)) - 1]


def _around(value: float, half: float) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)
