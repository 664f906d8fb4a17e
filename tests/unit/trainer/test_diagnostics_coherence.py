"""Gradient coherence against gradients worked out by hand, in float64."""

import math

import numpy as np
import pytest
import torch

from services.trainer.diagnostics.coherence import gradient_coherence


def coherence(rows: list[list[float]]) -> float | None:
    """Of losses that are linear in one parameter, so that each row is a gradient."""
    weight = torch.zeros(len(rows[0]), dtype=torch.float64, requires_grad=True)
    gradients = torch.tensor(rows, dtype=torch.float64)
    return gradient_coherence([lambda row=row: (weight * row).sum() for row in gradients], [weight])


def test_its_three_landmarks() -> None:
    assert coherence([[3.0, 4.0]] * 5) == pytest.approx(1.0, abs=1e-15)
    assert coherence([[0.0, 1.0], [0.0, -1.0]]) == pytest.approx(0.0, abs=1e-15)
    orthogonal = [[2.0 * (i == j) for j in range(16)] for i in range(16)]
    assert coherence(orthogonal) == pytest.approx(1 / math.sqrt(16), abs=1e-15)
    assert coherence([[0.0, 0.0]] * 3) is None


def test_it_is_the_norm_of_the_mean_over_the_mean_of_the_norms() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 7)) * np.arange(1, 10)[:, None]
    expected = np.linalg.norm(rows.mean(axis=0)) / np.mean([np.linalg.norm(row) for row in rows])
    assert coherence(rows.tolist()) == pytest.approx(expected, rel=1e-12)


def test_parameters_that_a_loss_does_not_touch_count_as_zero_and_no_grad_is_left_behind() -> None:
    first, second = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = gradient_coherence([lambda: first.sum(), lambda: second.sum()], [first, second])
    assert found == pytest.approx(1 / math.sqrt(2), abs=1e-15)
    assert first.grad is None and second.grad is None
