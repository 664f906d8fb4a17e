"""Intervals of a preflight: over prompts for what is measured, over steps for what a pilot's curve does.

P prompts, n steps. Responses to one prompt say little about the next, so prompts are resampled, whole (percentile
bootstrap, seeded); teachers are compared on the same resamples.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.trainer.evaluation.estimates import CONFIDENCE, NUM_RESAMPLES, Estimate, tails

Values = NDArray[np.float64]
_MIN_SLOPE_STEPS = 4
_NUM_STUDENT_DRAWS = 200_000


def ratio_over_prompts(totals_P: Values, counts_P: Values, *, seed: int = 0) -> Estimate:
    """sum of totals / sum of counts: a mean over positions whose chance is in the prompts. Some count is above 0."""
    totals, counts = _resampled_sums(totals_P, seed), _resampled_sums(counts_P, seed)
    ratios = totals[counts > 0] / counts[counts > 0]
    return _estimate(float(totals_P.sum() / counts_P.sum()), ratios)


def difference_over_prompts(one: tuple[Values, Values], other: tuple[Values, Values], *, seed: int = 0) -> Estimate:
    """Ratio of `one` minus ratio of `other`, (totals, counts) over the same P prompts, resampled together."""
    (totals, counts), (other_totals, other_counts) = one, other
    drawn = [_resampled_sums(column, seed) for column in (totals, counts, other_totals, other_counts)]
    known = (drawn[1] > 0) & (drawn[3] > 0)
    differences = drawn[0][known] / drawn[1][known] - drawn[2][known] / drawn[3][known]
    value = totals.sum() / counts.sum() - other_totals.sum() / other_counts.sum()
    return _estimate(float(value), differences)


def slope(values: Sequence[float], *, seed: int = 0) -> Estimate | None:
    """Least-squares change per step with Student's interval (n - 2 degrees of freedom); None under 4 steps."""
    num_steps = len(values)
    if num_steps < _MIN_SLOPE_STEPS:
        return None
    steps = np.arange(num_steps) - (num_steps - 1) / 2
    observed = np.asarray(values, np.float64)
    spread = float((steps**2).sum())
    value = float((steps * observed).sum() / spread)
    residuals = observed - observed.mean() - value * steps
    error = float(np.sqrt((residuals**2).sum() / (num_steps - 2) / spread))
    draws = np.random.default_rng([seed, num_steps]).standard_t(num_steps - 2, _NUM_STUDENT_DRAWS)
    width = float(np.quantile(np.abs(draws), CONFIDENCE)) * error
    return Estimate(value=value, low=value - width, high=value + width)


def _resampled_sums(values_P: Values, seed: int) -> Values:
    """[NUM_RESAMPLES]; the same seed and P give the same resamples."""
    num_prompts = values_P.size
    generator = np.random.default_rng([seed, num_prompts])
    # How often each prompt is drawn is all that a sum needs to know.
    draws = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=NUM_RESAMPLES)
    sums: Values = draws @ values_P
    return sums


def _estimate(value: float, resampled: Values) -> Estimate:
    low, high = np.quantile(resampled, tails())
    return Estimate(value=value, low=float(low), high=float(high))
