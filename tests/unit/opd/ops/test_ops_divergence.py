"""Every form against plain sums and finite differences in float64, with its special cases and its limits."""

import math

import pytest
import torch
from torch import Tensor

from opd.errors import InvalidRequestError
from opd.ops import FORWARD_KL, MASKED_LOGIT, REVERSE_KL, row_divergence

BETAS = [0.0, 1e-3, 0.3, 0.5, 0.9, 1.0]


def rows(seed: int, num_rows: int = 5, num_columns: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, num_rows, num_columns, generator=generator, dtype=torch.float64) * 2
    return student.requires_grad_(), teacher


def by_hand(student: Tensor, teacher: Tensor, beta: float) -> list[float]:
    """The definition, one number at a time."""
    found = []
    for student_row, teacher_row in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (student_row, teacher_row))
        m = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
        if beta in (0.0, 1.0):
            pairs = zip(p, q, strict=True) if beta else zip(q, p, strict=True)
            found.append(math.fsum(a * math.log(a / b) for a, b in pairs))
            continue
        to_student = math.fsum(a * math.log(a / c) for a, c in zip(p, m, strict=True))
        to_teacher = math.fsum(b * math.log(b / c) for b, c in zip(q, m, strict=True))
        found.append(beta * to_teacher + (1 - beta) * to_student)
    return found


@pytest.mark.parametrize("beta", BETAS)
def test_the_value_is_that_of_the_definition(beta: float) -> None:
    student, teacher = rows(0)
    torch.testing.assert_close(
        row_divergence(student, teacher, beta).tolist(), by_hand(student, teacher, beta), atol=1e-13, rtol=1e-12
    )


@pytest.mark.parametrize("beta", BETAS)
def test_the_closed_form_is_the_gradient_of_the_value(beta: float) -> None:
    student, teacher = rows(1)
    assert torch.autograd.gradcheck(lambda logits: row_divergence(logits, teacher, beta), student)
    (found,) = torch.autograd.grad(row_divergence(student, teacher, beta).sum(), student)
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    expected = {
        FORWARD_KL: p - q,
        REVERSE_KL: p * ((p / q).log() - (p * (p / q).log()).sum(-1, keepdim=True)),
    }.get(beta)
    if expected is not None:
        torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-12)
    assert found.sum(-1).abs().max() < 1e-13, "no form moves the normaliser"


def test_the_ends_are_special_cases_and_not_the_limits() -> None:
    """The form itself vanishes at both ends; scaled, its limits are the two divergences that stand there."""
    student, teacher = rows(2)
    tiny = 1e-6
    for end, near, scale in ((FORWARD_KL, tiny, tiny), (REVERSE_KL, 1 - tiny, tiny)):
        torch.testing.assert_close(
            row_divergence(student, teacher, near) / scale, row_divergence(student, teacher, end), atol=1e-4, rtol=1e-4
        )


def test_the_balanced_form_is_symmetric_and_bounded() -> None:
    student, teacher = rows(3)
    found = row_divergence(student, teacher, 0.5)
    torch.testing.assert_close(found, row_divergence(teacher, student, 0.5), atol=1e-13, rtol=1e-12)
    assert (found < math.log(2)).all() and (found > 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_equal_rows_have_neither_value_nor_gradient(beta: float) -> None:
    student, _ = rows(4)
    found = row_divergence(student, student.detach() + 3.0, beta)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert found.detach().abs().max() < 1e-14 and gradient.abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", BETAS)
def test_masked_outcomes_count_for_nothing(beta: float, dtype: torch.dtype) -> None:
    student, teacher = (row.detach().to(dtype) for row in rows(5))
    wide = [torch.cat([row, torch.full((5, 2), MASKED_LOGIT, dtype=dtype)], dim=-1) for row in (student, teacher)]
    wide[0].requires_grad_(), student.requires_grad_()
    found, expected = row_divergence(*wide, beta), row_divergence(student, teacher, beta)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), wide[0])
    (narrow,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(gradient[:, :7], narrow)
    assert not gradient[:, 7:].any()
    nothing = torch.full((1, 3), MASKED_LOGIT, dtype=dtype, requires_grad=True)
    empty = row_divergence(nothing, nothing.detach(), beta)
    eps = torch.finfo(dtype).eps
    assert empty.abs().item() <= eps and torch.autograd.grad(empty.sum(), nothing)[0].abs().max() <= eps


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_what_is_no_form_is_refused(beta: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"is outside 0\.\.1; 0 is the forward KL"):
        row_divergence(*rows(6), beta)
