"""Eq 3 and its gradient, and two losses that look right and train nothing, by exact enumeration in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from services.trainer.objectives.aggregation import Reduction
from services.trainer.objectives.contract import LossInputs, Needs
from services.trainer.objectives.objective import Objective, WeightedTerm
from services.trainer.objectives.sampled_token import SampledToken
from services.trainer.objectives.top_k import exact_divergence

Make = Callable[..., Any]


def _objective(reduction: Reduction | None = None) -> Objective:
    return Objective(terms=(WeightedTerm(name="signal", term=SampledToken()),), reduction=reduction or Reduction())


def _full_divergence_gradient(models: Any) -> Tensor:
    """Eq 4's local gradient in the logits, from its closed form p (log p / q - KL)."""
    student, teacher = models.student_logits_TV.detach().log_softmax(-1), models.teacher_logits_TV.log_softmax(-1)
    divergence = (student.exp() * (student - teacher)).sum(-1, keepdim=True)
    return student.exp() * (student - teacher - divergence)


def _expected_gradient(models: Any, loss_of: Callable[[Any], Tensor]) -> Tensor:
    """The expectation over y ~ p of each position's gradient: every id of the vocabulary in turn, weighted by p."""
    probs_TV = models.student_logits_TV.detach().softmax(-1)
    total = torch.zeros_like(probs_TV)
    for v in range(probs_TV.shape[-1]):
        models.sampled_T.fill_(v)
        (gradient,) = torch.autograd.grad(loss_of(models), models.student_logits_TV)
        total += probs_TV[:, v : v + 1] * gradient
    return total


def test_value_and_gradient_follow_eq_3(make_models: Make) -> None:
    models = make_models(0)
    found = _objective()(models.inputs())
    rows = torch.arange(len(models.sampled_T))
    student, teacher = models.student_logits_TV.detach().log_softmax(-1), models.teacher_logits_TV.log_softmax(-1)
    log_ratio_T = student[rows, models.sampled_T] - teacher[rows, models.sampled_T]
    torch.testing.assert_close(found.position_loss_T, log_ratio_T, atol=1e-12, rtol=1e-12)
    (gradient,) = torch.autograd.grad(found.loss_sum, models.student_logits_TV)
    # w (log p / q) grad log p(y), where grad log p(y) in the logits is onehot(y) - p.
    onehot = torch.nn.functional.one_hot(models.sampled_T, student.shape[-1])
    expected = log_ratio_T.unsqueeze(-1) * (onehot - student.exp())
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-12)


def test_it_is_unbiased_for_the_gradient_of_eq_4(make_models: Make) -> None:
    models = make_models(1)
    found = _expected_gradient(models, lambda case: _objective()(case.inputs()).loss_sum)
    torch.testing.assert_close(found, _full_divergence_gradient(models), atol=1e-12, rtol=1e-12)
    assert found.norm() > 0.1


def test_differentiating_the_log_ratio_itself_trains_nothing_in_expectation(make_models: Make) -> None:
    models = make_models(1)

    def buggy(case: Any) -> Tensor:
        inputs = case.inputs()
        return (inputs.student_sampled_logprobs_T - inputs.teacher_sampled_logprobs_T).sum()

    (single,) = torch.autograd.grad(buggy(models), models.student_logits_TV)
    assert single.norm() > 0.1, "each sample does have a gradient; only its mean is nothing"
    assert _expected_gradient(models, buggy).norm() < 1e-12
    ours = _expected_gradient(models, lambda case: _objective()(case.inputs()).loss_sum)
    assert ours.norm() > 0.1


def test_a_whole_divergence_as_advantage_of_the_sampled_token_trains_nothing_in_expectation(make_models: Make) -> None:
    models = make_models(2)

    def buggy(case: Any) -> Tensor:
        inputs = case.inputs()
        divergence_T = exact_divergence(inputs.student_logprobs_TK, inputs.teacher_logprobs_TK, inputs.support_mask_TK)
        return (divergence_T.detach() * inputs.student_sampled_logprobs_T).sum()

    def differentiated(case: Any) -> Tensor:
        inputs = case.inputs()
        return exact_divergence(inputs.student_logprobs_TK, inputs.teacher_logprobs_TK, inputs.support_mask_TK).sum()

    (single,) = torch.autograd.grad(buggy(models), models.student_logits_TV)
    assert single.norm() > 0.1
    assert _expected_gradient(models, buggy).norm() < 1e-12
    assert _expected_gradient(models, differentiated).norm() > 0.1


@pytest.mark.parametrize("cap", [0.5, 1.0, 2.0, 1e6])
def test_staleness_weights_the_position_and_is_held_constant(make_models: Make, cap: float) -> None:
    models = make_models(3)
    learner_T = models.inputs().student_sampled_logprobs_T.detach()
    rollout_T = learner_T + torch.tensor([-2.0, -0.5, 0.0, 0.3, 1.0, -800.0], dtype=torch.float64)
    inputs = models.inputs(rollout_logprobs_T=rollout_T)
    found = _objective(Reduction(staleness_cap=cap))(inputs)
    plain = _objective()(inputs)
    ratios = [min(float(torch.exp(torch.clamp(gap, max=700))), cap) for gap in learner_T - rollout_T]
    weights = torch.tensor(ratios, dtype=torch.float64)
    torch.testing.assert_close(found.position_loss_T, plain.position_loss_T * weights, atol=1e-10, rtol=1e-10)
    (gradient,) = torch.autograd.grad(found.loss_sum, models.student_logits_TV, retain_graph=True)
    (unweighted,) = torch.autograd.grad(plain.loss_sum, models.student_logits_TV)
    torch.testing.assert_close(gradient, unweighted * weights.unsqueeze(-1), atol=1e-9, rtol=1e-9)
    assert found.metrics["loss/staleness_weight"].value == pytest.approx(weights.mean().item())
    assert found.metrics["loss/staleness_capped_fraction"].value == pytest.approx(
        (weights >= cap).double().mean().item()
    )


def test_staleness_corrects_an_old_samplers_expectation(make_models: Make) -> None:
    """Tokens drawn by an older student, weighted by an uncapped ratio, still give the learner's own gradient."""
    models = make_models(4)
    old_TV = (models.student_logits_TV.detach() * 0.5).log_softmax(-1)
    objective = _objective(Reduction(staleness_cap=1e9))
    total = torch.zeros_like(old_TV)
    for v in range(old_TV.shape[-1]):
        models.sampled_T.fill_(v)
        loss = objective(models.inputs(rollout_logprobs_T=old_TV[:, v])).loss_sum
        (gradient,) = torch.autograd.grad(loss, models.student_logits_TV)
        total += old_TV[:, v : v + 1].exp() * gradient
    torch.testing.assert_close(total, _full_divergence_gradient(models), atol=1e-11, rtol=1e-11)


def test_it_needs_the_sampled_token_and_no_support(make_models: Make) -> None:
    objective = _objective()
    assert objective.needs == Needs(sampled=True, teacher_sampled=True)
    inputs = make_models(5).inputs()
    bare = LossInputs(
        valid_T=inputs.valid_T,
        student_sampled_logprobs_T=inputs.student_sampled_logprobs_T,
        teacher_sampled_logprobs_T=inputs.teacher_sampled_logprobs_T,
    )
    assert torch.equal(objective(bare).loss_sum, objective(inputs).loss_sum)
