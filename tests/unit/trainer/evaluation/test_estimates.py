"""Estimates against enumeration and against intervals known in closed form."""

from itertools import combinations

import numpy as np
import pytest

from services.trainer.evaluation.estimates import (
    gap_recovery,
    mean_over_problems,
    means_over_problems,
    means_over_rollouts,
    pass_at_k,
)
from services.trainer.evaluation.results import recovery_line


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_pass_at_k_equals_enumeration_of_all_choices(num_samples: int) -> None:
    for num_correct in range(num_samples + 1):
        outcomes = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            choices = [any(choice) for choice in combinations(outcomes, k)]
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(choices) / len(choices), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Mean over the binomial law of the number of right samples equals 1 - (1 - chance)^k."""
    from math import comb

    chance, num_samples = 0.3, 7
    for k in (1, 3, 7):
        mean = sum(
            comb(num_samples, right) * chance**right * (1 - chance) ** (num_samples - right) * pass_at_k(7, right, k)
            for right in range(num_samples + 1)
        )
        assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


@pytest.mark.parametrize("k", [0, 4])
def test_a_k_beyond_the_samples_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=r"outside 1\.\.3"):
        pass_at_k(3, 1, k)


def test_the_interval_of_a_mean_is_that_of_the_central_limit() -> None:
    values = np.random.default_rng(0).uniform(size=400)
    found = mean_over_problems(values)
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = [
        found.low <= 0.4 <= found.high
        for found in (mean_over_problems(generator.binomial(8, 0.4, size=60) / 8.0, seed=seed) for seed in range(200))
    ]
    assert 0.89 <= np.mean(covered) <= 0.99


def test_intervals_are_seeded_and_collapse_without_spread() -> None:
    values = np.random.default_rng(0).uniform(size=20)
    assert mean_over_problems(values, seed=4) == mean_over_problems(values, seed=4)
    assert mean_over_problems(values, seed=4) != mean_over_problems(values, seed=5)
    one = mean_over_problems(np.array([0.5]))
    assert (one.low, one.value, one.high) == (0.5, 0.5, 0.5)


def accuracies(mean: float, num_problems: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).binomial(16, mean, size=num_problems) / 16


def test_gap_recovery_is_the_ratio_of_gains() -> None:
    before, after, teacher = (accuracies(mean, 500, seed) for seed, mean in enumerate((0.2, 0.5, 0.6)))
    found = gap_recovery(before, after, teacher)
    gain, gap = after.mean() - before.mean(), teacher.mean() - before.mean()
    assert found.estimate is not None
    assert found.estimate.value == pytest.approx(gain / gap, abs=1e-12)
    # Delta method, in float64 and apart from the code under test.
    residuals = ((after - before) - gain / gap * (teacher - before)) / gap
    half = 1.96 * residuals.std(ddof=1) / np.sqrt(500)
    assert found.estimate.low == pytest.approx(gain / gap - half, abs=0.15 * half)
    assert found.estimate.high == pytest.approx(gain / gap + half, abs=0.15 * half)
    assert found.gap_standard_error == pytest.approx((teacher - before).std() / np.sqrt(500), rel=0.1)


def test_problems_are_resampled_together() -> None:
    """Recovery of exactly half on every single problem has no spread, however much accuracies vary."""
    before = accuracies(0.3, 50, 3)
    teacher = before + np.random.default_rng(4).uniform(0.1, 0.6, size=50)
    found = gap_recovery(before, (before + teacher) / 2, teacher)
    assert found.estimate is not None
    np.testing.assert_allclose([found.estimate.low, found.estimate.value, found.estimate.high], 0.5, atol=1e-12)


def test_a_negative_gap_has_no_recovery() -> None:
    before, teacher = accuracies(0.6, 200, 0), accuracies(0.3, 200, 1)
    found = gap_recovery(before, before, teacher)
    assert found.estimate is None and found.gap < 0


def test_a_gap_within_two_standard_errors_has_no_recovery() -> None:
    before = np.array([0.0, 1.0] * 20)
    teacher = np.roll(before, 1)
    teacher[:3] = 1.0
    found = gap_recovery(before, teacher, teacher)
    assert found.gap_standard_error is not None and 0 < found.gap < 2 * found.gap_standard_error
    assert found.estimate is None and found.reason == "not two standard errors above zero"


def test_an_identical_teacher_has_no_recovery() -> None:
    before = accuracies(0.5, 20, 0)
    assert gap_recovery(before, before, before).estimate is None


def test_one_problem_has_no_recovery() -> None:
    """Resampling it gives itself: an interval of no width that means nothing."""
    found = gap_recovery(np.array([0.0]), np.array([0.5]), np.array([1.0]))
    assert (found.estimate, found.gap, found.gap_standard_error) == (None, 1.0, None)
    assert recovery_line("m", "d", found) == "m on d: no gap recovery (gap 100.0%: one problem has no spread)"


def test_a_loss_is_a_negative_recovery() -> None:
    before, after, teacher = (accuracies(mean, 300, seed) for seed, mean in enumerate((0.4, 0.2, 0.7)))
    found = gap_recovery(before, after, teacher)
    assert found.estimate is not None and found.estimate.high < 0


def test_accuracies_on_other_problems_do_not_pair_up() -> None:
    with pytest.raises(ValueError, match="2, 3 and 2 problems"):
        gap_recovery(np.zeros(2), np.zeros(3), np.zeros(2))


def test_rollouts_of_one_problem_are_resampled_together() -> None:
    """Against resampling written out: whole problems are drawn, and the mean is over the rollouts drawn."""
    rng = np.random.default_rng(3)
    problems = rng.integers(0, 12, size=60)
    values = (rng.uniform(size=60) < problems / 12).astype(np.float64)
    (found,) = means_over_rollouts(values[:, None], problems.tolist())
    assert found.value == pytest.approx(values.mean())
    names = np.unique(problems)
    means = []
    for _ in range(4000):
        drawn = np.concatenate([values[problems == name] for name in rng.choice(names, size=len(names))])
        means.append(drawn.mean())
    expected = np.quantile(means, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.03)
    naive = np.quantile([rng.choice(values, size=60).mean() for _ in range(4000)], [0.025, 0.975])
    assert found.high - found.low > 1.2 * (naive[1] - naive[0])


def test_columns_share_their_resamples() -> None:
    values = np.random.default_rng(5).uniform(size=(30, 1))
    both = means_over_problems(np.concatenate([values, 2 * values], axis=1))
    assert (both[1].low, both[1].high) == pytest.approx((2 * both[0].low, 2 * both[0].high))
    alone = mean_over_problems(values[:, 0])
    assert (both[0].value, both[0].low, both[0].high) == pytest.approx((alone.value, alone.low, alone.high))
