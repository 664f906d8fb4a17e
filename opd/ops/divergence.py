"""Divergences between a student's and a teacher's rows, with the gradient in closed form.

T rows, K outcomes: a whole vocabulary, or a support with or without one outcome for the rest. One number names the
form: `beta` = 1 is the reverse KL(p || q), 0 the forward KL(q || p), and between them the generalised Jensen-Shannon
divergence, p the student and q the teacher. The two ends are special cases: the limits of the form itself are 0 there.
"""

import math
from typing import Any

import torch
from torch import Tensor

from opd.errors import InvalidRequestError

REVERSE_KL = 1.0
FORWARD_KL = 0.0


def row_divergence(student_logits_TK: Tensor, teacher_logits_TK: Tensor, beta: float = REVERSE_KL) -> Tensor:
    """[T] in nats; both sides are normalised over K here, so logits and log-probs of any normaliser do.

    With m = beta q + (1 - beta) p the value is beta KL(q || m) + (1 - beta) KL(p || m). Gradient with respect to a
    student logit, all that is kept for the way back: reverse p (log p / q - D), forward p - q, between them
    (1 - beta) p (log p / m - KL(p || m)). The teacher gets none. Raises `InvalidRequestError` unless 0 <= beta <= 1.
    """
    if not 0.0 <= beta <= 1.0:
        raise InvalidRequestError(f"beta={beta} is outside 0..1; 0 is the forward KL, 1 the reverse KL")
    function: Any = _RowDivergence
    divergence_T: Tensor = function.apply(student_logits_TK, teacher_logits_TK, beta)
    return divergence_T


class _RowDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_logits_TK: Tensor, teacher_logits_TK: Tensor, beta: float) -> Tensor:
        student_TK, teacher_TK = student_logits_TK.log_softmax(dim=-1), teacher_logits_TK.log_softmax(dim=-1)
        divergence_T, slope_TK = _value_and_slope(student_TK, teacher_TK, beta)
        ctx.save_for_backward(slope_TK)
        return divergence_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_T,), (slope_TK,) = grad_outputs, ctx.saved_tensors
        return grad_T.unsqueeze(-1) * slope_TK, None, None


def _value_and_slope(student_TK: Tensor, teacher_TK: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Of normalised log-probs."""
    student_probs_TK = student_TK.exp()
    if beta == FORWARD_KL:
        teacher_probs_TK = teacher_TK.exp()
        value_T = (teacher_probs_TK * (teacher_TK - student_TK)).sum(dim=-1)
        return value_T, student_probs_TK - teacher_probs_TK
    if beta == REVERSE_KL:
        log_ratio_TK = student_TK - teacher_TK
        value_T = (student_probs_TK * log_ratio_TK).sum(dim=-1)
        return value_T, student_probs_TK * (log_ratio_TK - value_T.unsqueeze(-1))
    mixture_TK = torch.logaddexp(teacher_TK + math.log(beta), student_TK + math.log1p(-beta))
    log_ratio_TK = student_TK - mixture_TK
    student_kl_T = (student_probs_TK * log_ratio_TK).sum(dim=-1)
    teacher_kl_T = (teacher_TK.exp() * (teacher_TK - mixture_TK)).sum(dim=-1)
    slope_TK = (1.0 - beta) * student_probs_TK * (log_ratio_TK - student_kl_T.unsqueeze(-1))
    return beta * teacher_kl_T + (1.0 - beta) * student_kl_T, slope_TK
