"""Advantages within groups, the outcome's gradient, and the entropy bonus."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from services.trainer.objectives import ObjectiveConfig
from services.trainer.objectives.dispatch import build_objective
from services.trainer.objectives.entropy import EntropyBonus
from services.trainer.objectives.outcome import Outcome, group_advantages
from tests.unit.trainer.objectives.conftest import TinyModels

Make = Callable[..., TinyModels]


def test_advantages_are_standardised_within_their_group() -> None:
    found = group_advantages([1.0, 5.0, 0.0, 0.0, 7.0, 1.0], [0, 1, 0, 0, 1, 0])
    deviation = math.sqrt(sum((r - 0.5) ** 2 for r in (1, 0, 0, 1)) / 3)
    high, low = 0.5 / (deviation + 1e-6), -0.5 / (deviation + 1e-6)
    pair = 1.0 / (math.sqrt(2) + 1e-6)
    assert found == pytest.approx([high, -pair, low, low, pair, high], rel=1e-12)
    assert sum(found[index] for index in (0, 2, 3, 5)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_group_without_a_difference_teaches_nothing(reward: float) -> None:
    assert group_advantages([reward] * 8, [3] * 8) == [0.0] * 8
    assert group_advantages([reward], [0]) == [0.0]


def test_the_gradient_pushes_sampled_tokens_by_the_advantage(make_models: Make) -> None:
    models = make_models(0)
    advantage_T = torch.tensor([1.5, -0.5, 0.0, 2.0, -1.0, 0.25], dtype=torch.float64)
    found = Outcome()(models.inputs(advantage_T=advantage_T)).loss_T
    torch.testing.assert_close(found.detach(), -advantage_T)
    (gradient,) = torch.autograd.grad(found.sum(), models.student_logits_TV)
    onehot = torch.nn.functional.one_hot(models.sampled_T, 9)
    expected = -advantage_T.unsqueeze(-1) * (onehot - models.student_logits_TV.detach().softmax(-1))
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-12)


def test_in_expectation_it_climbs_the_expected_reward(make_models: Make) -> None:
    """With a constant baseline the mean over y ~ p is minus the gradient of E[r] / deviation."""
    models = make_models(1)
    reward_V = torch.linspace(-1, 1, 9, dtype=torch.float64)
    probs_TV = models.student_logits_TV.softmax(-1)
    (expected,) = torch.autograd.grad(-(probs_TV * reward_V).sum(), models.student_logits_TV)
    total = torch.zeros_like(expected)
    for v in range(9):
        models.sampled_T.fill_(v)
        advantage_T = torch.full((6,), float(reward_V[v]) - 0.3, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(
            Outcome()(models.inputs(advantage_T=advantage_T)).loss_T.sum(), models.student_logits_TV
        )
        total += probs_TV.detach()[:, v : v + 1] * gradient
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=1e-11)


def test_mixing_is_the_weighted_sum_of_both_and_each_is_reported(make_models: Make) -> None:
    models = make_models(2)
    inputs = models.inputs(advantage_T=torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64))
    gradients = {}
    for name, config in {
        "both": ObjectiveConfig(outcome={"weight": 0.3}),
        "signal": ObjectiveConfig(),
        "outcome": ObjectiveConfig(kind="grpo"),
    }.items():
        output = build_objective(config)(inputs)
        (gradients[name],) = torch.autograd.grad(output.loss_sum, models.student_logits_TV, retain_graph=True)
    torch.testing.assert_close(gradients["both"], gradients["signal"] + 0.3 * gradients["outcome"])
    metrics = build_objective(ObjectiveConfig(outcome={"weight": 0.3}))(inputs).metrics
    total = metrics["loss/signal"].value + 0.3 * metrics["loss/outcome"].value
    assert metrics["loss/objective"].value == pytest.approx(total, rel=1e-12)


def test_the_staleness_weight_is_the_outcomes_ratio(make_models: Make) -> None:
    models = make_models(3)
    advantage_T = torch.ones(6, dtype=torch.float64)
    inputs = models.inputs(advantage_T=advantage_T)
    older_T = inputs.student_sampled_logprobs_T.detach() + math.log(2.0)
    found = build_objective(ObjectiveConfig(kind="grpo", staleness_cap=3.0))(
        dataclasses.replace(inputs, rollout_logprobs_T=older_T)
    )
    torch.testing.assert_close(found.position_loss_T, -0.5 * advantage_T)


def test_the_entropy_bonus_is_minus_the_entropy_with_its_gradient(make_models: Make) -> None:
    models = make_models(4)
    found = EntropyBonus()(models.inputs()).loss_T
    probs_TV = models.student_logits_TV.detach().softmax(-1)
    entropy_T = -(probs_TV * probs_TV.log()).sum(-1)
    torch.testing.assert_close(found.detach(), -entropy_T, atol=1e-12, rtol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), models.student_logits_TV)
    expected = probs_TV * (probs_TV.log() + entropy_T.unsqueeze(-1))
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-12)
