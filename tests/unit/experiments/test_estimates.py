"""Intervals against independent computations."""

import math
from statistics import mean, stdev

import numpy as np
import pytest
import torch

from experiments import estimates


def student_tail(t: float, degrees_of_freedom: int) -> float:
    """P(T > t) by summing the density in float64 up to where nothing is left."""
    x = torch.linspace(t, t + 4000, 4_000_001, dtype=torch.float64)
    constant = math.lgamma((degrees_of_freedom + 1) / 2) - math.lgamma(degrees_of_freedom / 2)
    density = torch.exp(
        constant
        - 0.5 * math.log(degrees_of_freedom * math.pi)
        - (degrees_of_freedom + 1) / 2 * torch.log1p(x * x / degrees_of_freedom)
    )
    return float(torch.trapezoid(density, x))


@pytest.mark.parametrize("units", [[0.1, 0.3, 0.35], [1.0, 2.0, 2.5, 4.0, 4.5], [0.2, 0.4]])
def test_the_interval_of_a_mean_is_students(units: list[float]) -> None:
    found = estimates.mean_of(units)
    assert found is not None
    assert found.value == pytest.approx(mean(units))
    t = (found.high - found.value) / (stdev(units) / len(units) ** 0.5)
    assert found.high - found.value == pytest.approx(found.value - found.low)
    assert student_tail(t, len(units) - 1) == pytest.approx(0.025, abs=2e-4)


def test_one_unit_has_no_interval() -> None:
    assert estimates.mean_of([0.5]) is None
    assert estimates.mean_of([]) is None
    assert estimates.difference_of([0.5], [0.1, 0.2]) is None


def test_a_difference_of_unpaired_units_adds_their_variances() -> None:
    first, second = [1.0, 1.4, 1.2], [0.5, 0.9, 0.1, 0.4, 0.6]
    found = estimates.difference_of(first, second)
    assert found is not None
    assert found.value == pytest.approx(mean(first) - mean(second))
    error = (stdev(first) ** 2 / 3 + stdev(second) ** 2 / 5) ** 0.5
    assert found.high - found.value == pytest.approx(4.303 * error, rel=1e-3)


def test_problems_are_resampled_together() -> None:
    """Where one model is better by the same on every problem, the difference is certain though each accuracy is not."""
    generator = np.random.default_rng(0)
    before_SP = generator.uniform(0, 0.5, (1, 64))
    after_SP = before_SP + 0.25
    gain = estimates.of_accuracies(lambda after, before: after - before, after_SP, before_SP)
    assert (gain.low, gain.value, gain.high) == pytest.approx((0.25, 0.25, 0.25))
    level = estimates.of_accuracies(lambda after: after, after_SP)
    assert level.high - level.low > 0.05


def test_the_interval_of_an_accuracy_has_the_width_of_its_standard_error() -> None:
    values_SP = np.random.default_rng(1).uniform(0, 1, (1, 400))
    found = estimates.of_accuracies(lambda value: value, values_SP)
    error = values_SP.std(ddof=1) / 20
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.value == pytest.approx(values_SP.mean())


def test_seeds_that_differ_widen_the_interval() -> None:
    problems_P = np.random.default_rng(2).uniform(0.4, 0.6, 200)
    alike = estimates.of_accuracies(lambda value: value, np.stack([problems_P] * 3))
    apart = estimates.of_accuracies(lambda value: value, np.stack([problems_P - 0.2, problems_P, problems_P + 0.2]))
    assert apart.value == pytest.approx(alike.value)
    assert apart.high - apart.low > 5 * (alike.high - alike.low)


def test_recovery_is_the_closed_share_of_the_gap() -> None:
    before_SP = np.full((1, 50), 0.4) + np.linspace(-0.1, 0.1, 50)
    teacher_SP = before_SP + 0.4
    after_SP = np.stack([before_SP[0] + 0.3, before_SP[0] + 0.34])
    found = estimates.recovery(before_SP, after_SP, teacher_SP)
    assert found is not None
    assert found.value == pytest.approx(0.8)
    assert (found.low, found.high) == pytest.approx((0.75, 0.85))


def test_without_a_gap_there_is_no_recovery() -> None:
    before_SP = np.random.default_rng(3).uniform(0, 1, (1, 50))
    assert estimates.recovery(before_SP, before_SP, before_SP - 0.1) is None


def with_gap(num_standard_errors: float, gain: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Before, after and teacher on 100 problems; the gap has so many standard errors, the gain is alike."""
    gaps_P = np.random.default_rng(seed).normal(size=100)
    gaps_P = (gaps_P - gaps_P.mean()) / gaps_P.std() + num_standard_errors / 10
    before_SP = np.zeros((1, 100))
    return before_SP, before_SP + gain, before_SP + gaps_P


@pytest.mark.parametrize("gain", [0.1, -0.1])
def test_resamples_without_a_gap_count_as_infinite_recovery(gain: float) -> None:
    """Of a gap of 2.2 standard errors 1.4 % of the resamples have none: the bound is that of the others at 1.1 %."""
    before_SP, after_SP, teacher_SP = with_gap(2.2, gain, seed=0)
    found = estimates.recovery(before_SP, after_SP, teacher_SP)
    assert found is not None
    picks = np.random.default_rng(9).integers(100, size=(20_000, 100))
    near, far = np.quantile(teacher_SP[0][picks].mean(axis=1), [0.025, 0.975])
    assert near > 0
    closest, furthest = (found.low, found.high) if gain > 0 else (found.high, found.low)
    assert closest == pytest.approx(gain / far, rel=0.04)
    assert abs(gain / furthest) == pytest.approx(near, abs=0.014), "0.14 standard errors"
    assert found.low < found.value < found.high


def test_a_difference_of_recoveries_is_known_where_both_are() -> None:
    clear, other = with_gap(30, 1.5, seed=1), with_gap(30, 0.9, seed=2)
    found = estimates.recovery_difference(clear, other)
    assert found is not None
    assert found.value == pytest.approx(0.6 / 3)
    assert 0 < found.low < found.value < found.high < 0.4
    hidden = with_gap(1.5, 0.1, seed=3)
    assert estimates.recovery_difference(clear, hidden) is None
    assert estimates.recovery_difference(hidden, clear) is None


def test_recoveries_that_are_infinite_together_widen_their_difference_both_ways() -> None:
    """With 3 gaps in 10 problems 2.8 % of the resamples have none, for both arms at once."""
    before_SP = np.zeros((1, 10))
    teacher_SP = np.array([[1.0] * 3 + [0.0] * 7])
    found = estimates.recovery_difference(
        (before_SP, before_SP + 0.2, teacher_SP), (before_SP, before_SP + 0.1, teacher_SP)
    )
    assert found is not None
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert found.value == pytest.approx(1 / 3)


def area(rewards: list[float], is_correct: list[bool]) -> float:
    """By counting every pair."""
    right = [reward for reward, correct in zip(rewards, is_correct, strict=True) if correct]
    wrong = [reward for reward, correct in zip(rewards, is_correct, strict=True) if not correct]
    return mean([float(one > other) + 0.5 * (one == other) for one in right for other in wrong])


def test_a_difference_of_areas_is_that_of_the_same_rollouts() -> None:
    generator = np.random.default_rng(5)
    is_correct = (generator.uniform(size=160) < 0.5).tolist()
    first = (generator.normal(size=160) + np.array(is_correct)).tolist()
    second = generator.normal(size=160).tolist()
    found = estimates.of_aurocs(first, second, is_correct, [index // 4 for index in range(160)])
    assert found is not None
    assert found.value == pytest.approx(area(first, is_correct) - area(second, is_correct))
    assert 0 < found.low < found.value < found.high
    same = estimates.of_aurocs(first, first, is_correct, list(range(160)))
    assert same is not None and (same.low, same.value, same.high) == (0, 0, 0)
    assert estimates.of_aurocs(first, second, [True] * 160, list(range(160))) is None
