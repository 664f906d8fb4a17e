"""AUROC and its interval against going through all pairs and resampling problems one by one."""

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from services.trainer.evaluation.estimates import resampled_counts
from services.trainer.evaluation.figures import draw_rewards
from services.trainer.evaluation.reward import auroc_over_problems, judge_rewards, reward_table


def pairwise(rewards: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """P(right > wrong), ties 1/2, by going through every pair."""
    right, wrong = rewards[correct], rewards[~correct]
    return float(np.mean((right[:, None] > wrong) + 0.5 * (right[:, None] == wrong)))


def rollouts(seed: int) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """Rewards with ties, verdicts that depend on the problem, and unequal numbers of rollouts."""
    generator = np.random.default_rng(seed)
    problems = generator.integers(0, 9, size=70) * 3
    correct = generator.uniform(size=70) < problems / 30
    rewards = np.round(generator.normal(size=70) + correct + problems / 20, 1)
    return rewards, correct, problems


def test_value_and_interval_equal_the_long_way_round() -> None:
    rewards, correct, problems = rollouts(0)
    found = auroc_over_problems(rewards.tolist(), correct.tolist(), problems.tolist(), seed=4)
    assert found is not None
    assert found.value == pytest.approx(pairwise(rewards, correct), abs=1e-12)
    names = np.unique(problems)
    values = []
    for counts in resampled_counts(len(names), 4).astype(int):
        drawn = np.concatenate([np.flatnonzero(problems == name) for name in np.repeat(names, counts)])
        if correct[drawn].any() and not correct[drawn].all():
            values.append(pairwise(rewards[drawn], correct[drawn]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12)


def test_resamples_draw_as_many_problems_as_there_are() -> None:
    counts = resampled_counts(7, 0)
    assert counts.shape == (2000, 7)
    assert (counts.sum(axis=1) == 7).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(7), abs=0.1)


@pytest.mark.parametrize("verdict", [True, False])
def test_one_class_alone_has_no_auroc(verdict: bool) -> None:
    found = judge_rewards("t", "f", [0.1, 0.2], [verdict, verdict], [0, 1])
    assert found.auroc is None
    assert (found.mean_correct is None) is not verdict
    assert (found.mean_incorrect is None) is verdict
    console = Console(file=io.StringIO(), width=80)
    console.print(reward_table([found], 2, 0, "title"))
    assert isinstance(console.file, io.StringIO) and "absent" in console.file.getvalue()


def test_means_are_of_each_class() -> None:
    rewards, correct, problems = rollouts(1)
    found = judge_rewards("t", "f", rewards.tolist(), correct.tolist(), problems.tolist())
    assert found.mean_correct is not None and found.mean_incorrect is not None
    assert found.mean_correct.value == pytest.approx(rewards[correct].mean())
    assert found.mean_incorrect.value == pytest.approx(rewards[~correct].mean())
    assert found.rewards == tuple(rewards)


def test_the_table_is_80_columns_wide_and_the_figure_is_drawn(tmp_path: Path) -> None:
    rewards, correct, problems = rollouts(2)
    results = [
        judge_rewards(name, "f", (rewards * scale).tolist(), correct.tolist(), problems.tolist())
        for name, scale in (("teacher-post", 1.0), ("Qwen3-4B (pool)", -0.1))
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(reward_table(results, int(correct.sum()), int((~correct).sum()), "title"))
    assert isinstance(console.file, io.StringIO)
    assert max(len(line) for line in console.file.getvalue().splitlines()) <= 80
    assert results[0].auroc is not None and f"{results[0].auroc.value:.3f}" in console.file.getvalue()
    draw_rewards(results, correct.tolist(), "student", tmp_path / "rewards.png")
    assert (tmp_path / "rewards.png").read_bytes().startswith(b"\x89PNG")
    same = judge_rewards("t", "f", [0.0] * 4, [True, False, True, True], [0, 0, 1, 1])
    assert same.auroc is not None and same.auroc.value == 0.5
    draw_rewards([same], [True, False, True, True], "student", tmp_path / "same.png")
