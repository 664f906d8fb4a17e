"""Value and gradient of the top-k forms against loops over the full vocabulary and finite differences, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from services.trainer.objectives import GradientForm, Support, SupportWeight
from services.trainer.objectives.objective import Objective, WeightedTerm
from services.trainer.objectives.top_k import TopK

Make = Callable[..., Any]


def _support_of(models: Any, support: Support, position: int) -> list[int]:
    student, teacher = set(models.student_ids_Tk[position].tolist()), set(models.teacher_ids_Tk[position].tolist())
    chosen = {
        Support.STUDENT: student,
        Support.TEACHER: teacher,
        Support.OVERLAP: student & teacher,
        Support.NON_OVERLAP: student ^ teacher,
        Support.UNION: student | teacher,
    }
    return sorted(chosen[support])


def _distributions(models: Any, position: int) -> tuple[list[float], list[float]]:
    rows = (models.student_logits_TV.detach()[position], models.teacher_logits_TV[position])
    sums = [sum(math.exp(value) for value in row.tolist()) for row in rows]
    student, teacher = ([math.exp(v) / z for v in row.tolist()] for row, z in zip(rows, sums, strict=True))
    return student, teacher


def _weights(
    student: list[float], teacher: list[float], ids: list[int], weight: SupportWeight, renormalize: bool
) -> dict[int, float]:
    source = {
        SupportWeight.STUDENT: lambda v: student[v],
        SupportWeight.TEACHER: lambda v: teacher[v],
        SupportWeight.UNIFORM: lambda _: 1.0,
    }[weight]
    total = sum(source(v) for v in ids) if renormalize else 1.0
    return {v: source(v) / total for v in ids}


def _exact_by_hand(models: Any, support: Support) -> tuple[list[float], Tensor]:
    """Eq 5 per position, and its gradient in the logits: p_S (log p_S / q_S - D) on the support."""
    losses, gradient = [], torch.zeros_like(models.teacher_logits_TV)
    for position in range(len(models.sampled_T)):
        student, teacher = _distributions(models, position)
        ids = _support_of(models, support, position)
        student_mass, teacher_mass = sum(student[v] for v in ids), sum(teacher[v] for v in ids)
        ratios = {v: math.log(student[v] / student_mass) - math.log(teacher[v] / teacher_mass) for v in ids}
        divergence = math.fsum(student[v] / student_mass * ratios[v] for v in ids)
        losses.append(divergence)
        for v in ids:
            gradient[position, v] = student[v] / student_mass * (ratios[v] - divergence)
    return losses, gradient


def _policy_by_hand(
    models: Any, support: Support, weight: SupportWeight, renormalize: bool
) -> tuple[list[float], Tensor]:
    """sum over S of w log(p / q), and sum over S of w log(p / q) grad log p, with grad log p(v) = onehot(v) - p."""
    losses, gradient = [], torch.zeros_like(models.teacher_logits_TV)
    for position in range(len(models.sampled_T)):
        student, teacher = _distributions(models, position)
        ids = _support_of(models, support, position)
        weights = _weights(student, teacher, ids, weight, renormalize)
        pushes = {v: weights[v] * (math.log(student[v]) - math.log(teacher[v])) for v in ids}
        losses.append(math.fsum(pushes.values()))
        for v, push in pushes.items():
            gradient[position, v] += push
            gradient[position] -= push * torch.tensor(student, dtype=torch.float64)
    return losses, gradient


def _reduced(term: TopK) -> Objective:
    """The term alone, summed."""
    return Objective(terms=(WeightedTerm(name="signal", term=term),))


def _gradient(term: TopK, models: Any) -> Tensor:
    (gradient,) = torch.autograd.grad(_reduced(term)(models.inputs(term.support)).loss_sum, models.student_logits_TV)
    return gradient


@pytest.mark.parametrize("support", list(Support))
@pytest.mark.parametrize("seed", range(3))
def test_exact_matches_eq_5_and_its_gradient(make_models: Make, support: Support, seed: int) -> None:
    models = make_models(seed)
    objective = TopK(gradient=GradientForm.EXACT, support=support)
    found = _reduced(objective)(models.inputs(support))
    losses, gradient = _exact_by_hand(models, support)
    torch.testing.assert_close(found.position_loss_T.tolist(), losses, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.loss_sum.item(), sum(losses), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(_gradient(objective, models), gradient, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("support", list(Support))
def test_exact_matches_finite_differences(make_models: Make, support: Support) -> None:
    models = make_models(5)
    objective = TopK(support=support)

    def loss(logits_TV: Tensor) -> Tensor:
        # The support stays the rollout's own while the logits move: S is a constant of the loss.
        return _reduced(objective)(models.inputs(support, logits_TV=logits_TV)).loss_sum

    assert torch.autograd.gradcheck(loss, models.student_logits_TV)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("weight", list(SupportWeight))
@pytest.mark.parametrize("support", list(Support))
def test_policy_matches_its_formula(
    make_models: Make, support: Support, weight: SupportWeight, renormalize: bool
) -> None:
    models = make_models(1)
    objective = TopK(gradient=GradientForm.POLICY, support=support, weight=weight, renormalize=renormalize)
    losses, gradient = _policy_by_hand(models, support, weight, renormalize)
    found = _reduced(objective)(models.inputs(support)).position_loss_T
    torch.testing.assert_close(found.tolist(), losses, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(_gradient(objective, models), gradient, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("weight", list(SupportWeight))
def test_policy_gradient_matches_finite_differences_of_its_surrogate(make_models: Make, weight: SupportWeight) -> None:
    """With the stopped factors frozen at the current student, the surrogate is an ordinary function of the logits."""
    models = make_models(2)
    objective = TopK(gradient=GradientForm.POLICY, weight=weight)
    ids = models.student_ids_Tk
    student = models.student_logits_TV.detach().log_softmax(-1).gather(-1, ids)
    teacher = models.teacher_logits_TV.log_softmax(-1).gather(-1, ids)
    weights = {
        SupportWeight.STUDENT: student.softmax(-1),
        SupportWeight.TEACHER: teacher.softmax(-1),
        SupportWeight.UNIFORM: torch.full_like(student, 1 / ids.shape[-1]),
    }[weight]
    advantage = weights * (teacher - student)

    def surrogate(logits_TV: Tensor) -> Tensor:
        return -(advantage * (logits_TV.log_softmax(-1).gather(-1, ids) - student).exp()).sum()

    step, numeric = 1e-6, torch.zeros_like(models.teacher_logits_TV)
    for index in range(numeric.numel()):
        shift = torch.zeros(numeric.numel(), dtype=torch.float64)
        shift[index] = step
        moved = models.student_logits_TV.detach(), shift.view_as(numeric)
        numeric.view(-1)[index] = (surrogate(moved[0] + moved[1]) - surrogate(moved[0] - moved[1])) / (2 * step)
    torch.testing.assert_close(_gradient(objective, models), numeric, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("support", list(Support))
def test_policy_is_exact_plus_what_moves_the_mass_of_the_support(make_models: Make, support: Support) -> None:
    """policy (w = student) = exact + (D + log P_S / Q_S) grad log P_S."""
    models = make_models(3)
    mass_gradient = torch.zeros_like(models.teacher_logits_TV)
    for position in range(len(models.sampled_T)):
        student, teacher = _distributions(models, position)
        ids = _support_of(models, support, position)
        student_mass, teacher_mass = sum(student[v] for v in ids), sum(teacher[v] for v in ids)
        divergence = _exact_by_hand(models, support)[0][position]
        for v in range(len(student)):
            # grad log P_S in logit v is p(v) (1[v in S] / P_S - 1).
            slope = student[v] * ((v in ids) / student_mass - 1)
            mass_gradient[position, v] = (divergence + math.log(student_mass / teacher_mass)) * slope
    exact = _gradient(TopK(gradient=GradientForm.EXACT, support=support), models)
    policy = _gradient(TopK(gradient=GradientForm.POLICY, support=support), models)
    torch.testing.assert_close(policy, exact + mass_gradient, atol=1e-12, rtol=1e-12)
    assert mass_gradient.norm() > 1e-3, "the two forms must differ for the identity to say anything"


@pytest.mark.parametrize("renormalize", [True, False])
def test_on_the_whole_vocabulary_all_forms_are_the_full_divergence(make_models: Make, renormalize: bool) -> None:
    models = make_models(4, score_top_k=9)
    student, teacher = models.student_logits_TV.log_softmax(-1), models.teacher_logits_TV.log_softmax(-1)
    full_T = (student.exp() * (student - teacher)).sum(-1)
    (expected,) = torch.autograd.grad(full_T.sum(), models.student_logits_TV, retain_graph=True)
    for gradient in GradientForm:
        renormalized = renormalize or gradient is GradientForm.EXACT
        objective = TopK(gradient=gradient, renormalize=renormalized)
        torch.testing.assert_close(
            _reduced(objective)(models.inputs()).position_loss_T, full_T.detach(), atol=1e-12, rtol=1e-12
        )
        torch.testing.assert_close(_gradient(objective, models), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("gradient", list(GradientForm))
@pytest.mark.parametrize("support", list(Support))
def test_a_teacher_equal_to_the_student_teaches_nothing(
    make_models: Make, support: Support, gradient: GradientForm
) -> None:
    models = make_models(6)
    models.teacher_logits_TV.copy_(models.student_logits_TV.detach() + 3.0)
    objective = TopK(gradient=gradient, support=support)
    found = _reduced(objective)(models.inputs(support))
    assert abs(found.loss_sum.item()) < 1e-12
    assert _gradient(objective, models).norm() < 1e-12
    assert found.num_positions == len(models.sampled_T)


def test_at_top_1_exact_is_identically_zero_and_policy_trains(make_models: Make) -> None:
    models = make_models(7, score_top_k=1)
    exact, policy = TopK(), TopK(gradient=GradientForm.POLICY)
    found = _reduced(exact)(models.inputs())
    assert found.loss_sum.item() == 0.0 and not _gradient(exact, models).any()
    assert found.metrics["loss/small_support_fraction"].value == 1.0
    gradient = _gradient(policy, models)
    top = models.student_ids_Tk.squeeze(-1)
    for position, v in enumerate(top.tolist()):
        student, teacher = _distributions(models, position)
        # The arg-max is pushed up, i.e. its logit gradient is negative, exactly when the teacher likes it better.
        assert (gradient[position, v] < 0) == (teacher[v] > student[v])
    assert gradient.norm() > 1e-2


def test_exact_is_blind_to_a_constant_per_row_and_policy_is_not(make_models: Make) -> None:
    """Raw logits do for the exact form, which is what makes a head on the support alone possible."""
    models = make_models(8)
    inputs = models.inputs()
    shift = torch.linspace(-3, 3, len(models.sampled_T), dtype=torch.float64).unsqueeze(-1)
    fields = {name: getattr(inputs, name) for name in ("valid_T", "support_mask_TK", "teacher_logprobs_TK")}
    moved = type(inputs)(student_logprobs_TK=inputs.student_logprobs_TK + shift, **fields)
    exact, policy = TopK(), TopK(gradient=GradientForm.POLICY)
    torch.testing.assert_close(exact(moved).loss_T, exact(inputs).loss_T, atol=1e-12, rtol=1e-12)
    assert (policy(moved).loss_T - policy(inputs).loss_T).abs().max() > 0.1


@pytest.mark.parametrize("gradient", list(GradientForm))
def test_empty_supports_lose_nothing_and_stay_in_the_denominator(make_models: Make, gradient: GradientForm) -> None:
    models = make_models(9)
    inputs = models.inputs(Support.OVERLAP)
    mask = inputs.support_mask_TK.clone()
    mask[2], mask[4, 1:] = False, False
    fields = {name: getattr(inputs, name) for name in ("valid_T", "student_logprobs_TK", "teacher_logprobs_TK")}
    term = TopK(gradient=gradient, support=Support.OVERLAP)
    found = _reduced(term)(type(inputs)(support_mask_TK=mask, **fields))
    assert found.position_loss_T[2] == 0.0
    assert found.num_positions == found.metrics["loss/objective"].count == len(models.sampled_T)
    (slope,) = torch.autograd.grad(found.loss_sum, models.student_logits_TV)
    assert not slope[2].any() and slope.isfinite().all()
    sizes = mask.sum(-1)
    assert found.metrics["loss/small_support_fraction"].value == (sizes < 2).double().mean().item()
    assert found.metrics["loss/support_size"].value == sizes.double().mean().item()


def test_what_each_support_needs_is_said() -> None:
    needs = {support: TopK(support=support).needs for support in Support}
    assert {support: (found.candidates, found.teacher_top_k) for support, found in needs.items()} == {
        Support.STUDENT: (True, False),
        Support.TEACHER: (False, True),
        Support.OVERLAP: (False, True),
        Support.NON_OVERLAP: (True, True),
        Support.UNION: (True, True),
    }
    assert not any(found.sampled or found.teacher_sampled or found.outside for found in needs.values())
