"""Intervals against what statistics says of them."""

import numpy as np
import pytest

from services.trainer.recipes.preflight.estimates import difference_over_prompts, ratio_over_prompts, slope


def test_a_ratio_is_the_mean_over_positions_and_its_interval_that_of_prompts() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(50, 150, size=400).astype(np.float64)
    totals = counts * generator.normal(0.8, 0.1, size=400)
    found = ratio_over_prompts(totals, counts)
    assert found.value == pytest.approx(totals.sum() / counts.sum(), rel=1e-12)
    # The delta method: the variance of a ratio of means is that of the residuals over the squared mean count.
    error = np.sqrt(np.var(totals - found.value * counts, ddof=1) / 400) / counts.mean()
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.08)
    assert ratio_over_prompts(totals, counts) == found


def test_prompts_without_positions_do_not_count() -> None:
    found = ratio_over_prompts(np.array([1.0, 0.0, 3.0]), np.array([1.0, 0.0, 1.0]))
    assert found.value == 2.0
    assert 1.0 <= found.low <= found.high <= 3.0


def test_a_difference_is_drawn_on_the_same_prompts() -> None:
    generator = np.random.default_rng(1)
    counts = np.full(50, 10.0)
    one = generator.normal(5.0, 2.0, size=50)
    same = difference_over_prompts((one, counts), (one, counts))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    shifted = difference_over_prompts((one + 1.0, counts), (one, counts))
    for bound in (shifted.value, shifted.low, shifted.high):
        assert bound == pytest.approx(0.1, abs=1e-12)


def test_a_slope_has_students_interval() -> None:
    values = [0.1, 0.4, 0.35, 0.7]
    found = slope(values)
    assert found is not None
    (expected, _), covariance = np.polyfit(range(4), values, 1, cov=True)
    assert found.value == pytest.approx(expected, rel=1e-9)
    # 4.3027 is the 97.5 % point of Student's distribution with 2 degrees of freedom.
    assert (found.high - found.value) / np.sqrt(covariance[0, 0]) == pytest.approx(4.3027, rel=0.02)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_a_straight_line_is_certain_and_three_steps_say_nothing() -> None:
    line = slope([0.0, 0.5, 1.0, 1.5, 2.0])
    assert line is not None
    assert (line.low, line.high) == (pytest.approx(0.5), pytest.approx(0.5))
    assert slope([1.0, 2.0, 3.0]) is None
