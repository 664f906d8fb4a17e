"""Distillation on a small support per position (eq 5): the exact divergence, and the reference code's policy form.

T positions, K support columns. p and q are student and teacher over the full vocabulary, p_S and q_S renormalised on
the support S, P_S and Q_S their masses on it, D = KL(p_S || q_S). With w = p_S,
policy = exact + (D + log P_S / Q_S) grad log P_S: the policy form also moves mass into and out of the support. The two
agree when S is the whole vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.ops import MASKED_LOGIT, REVERSE_KL, row_divergence
from services.trainer.objectives.checks import require_finite
from services.trainer.objectives.config import GradientForm, ObjectiveConfig, Support, SupportWeight, Tail
from services.trainer.objectives.contract import LossInputs, Needs, PositionLosses
from services.trainer.objectives.sampled_token import unit_ratio
from services.trainer.objectives.supports import NEEDS_CANDIDATES, NEEDS_TEACHER_TOP_K

TEACHER_TAIL_RESOLUTION = 1e-5
"""Least mass outside the support that a teacher's fp32 log-probs are trusted for (docs/decisions/0011)."""


def build(config: ObjectiveConfig) -> "TopK":
    return TopK(
        gradient=config.gradient,
        support=config.support,
        weight=config.weight,
        renormalize=config.renormalize,
        beta=config.divergence_beta,
        tail=config.tail,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TopK:
    """A divergence on the support with its exact gradient, or the policy form of the reverse KL.

    Exact: `opd.ops.row_divergence` of p_S and q_S; for the reverse KL sum over S of p_S (log p_S / q_S - D) grad log p,
    which sums to zero over S and vanishes identically on a support of one id. With `tail = bucket` the mass outside S
    is one more outcome, and nothing is renormalised.
    """

    gradient: GradientForm = GradientForm.EXACT
    support: Support = Support.STUDENT
    weight: SupportWeight = SupportWeight.STUDENT
    renormalize: bool = True
    beta: float = REVERSE_KL
    tail: Tail = Tail.DROP

    @property
    def needs(self) -> Needs:
        return Needs(
            support=True,
            # Renormalised on the support any constant cancels; the policy form has raw log-ratios, a bucket the rest.
            normalizer=self.gradient is GradientForm.POLICY or self.tail is Tail.BUCKET,
            candidates=self.support in NEEDS_CANDIDATES,
            teacher_top_k=self.support in NEEDS_TEACHER_TOP_K,
            outside=self.tail is Tail.BUCKET,
        )

    def __call__(self, inputs: LossInputs) -> PositionLosses:
        student_TK, teacher_TK = inputs.require("student_logprobs_TK"), inputs.require("teacher_logprobs_TK")
        mask_TK = inputs.require("support_mask_TK") & inputs.valid_T.unsqueeze(-1)
        require_finite("student log-prob", student_TK, mask_TK, inputs)
        require_finite("teacher log-prob", teacher_TK, mask_TK, inputs)
        sizes_T = mask_TK.sum(dim=-1)
        counted = {
            "loss/support_size": sizes_T.sum(),
            "loss/small_support_fraction": ((sizes_T < 2) & inputs.valid_T).sum(),
        }
        # Masked columns may hold NaN; they are replaced before any arithmetic, since 0 * NaN is NaN on the way back.
        student_TK, teacher_TK = student_TK.masked_fill(~mask_TK, 0.0), teacher_TK.masked_fill(~mask_TK, 0.0)
        if self.gradient is GradientForm.POLICY:
            weight_TK = support_weights(student_TK, teacher_TK, mask_TK, self.weight, renormalize=self.renormalize)
            return PositionLosses(loss_T=policy_loss(student_TK, teacher_TK, weight_TK), counted=counted)
        if self.tail is Tail.BUCKET:
            student_TK, teacher_TK, mask_TK, is_floored_T = _with_bucket(inputs, student_TK, teacher_TK, mask_TK)
            counted["loss/teacher_tail_floored_fraction"] = is_floored_T.sum()
        return PositionLosses(loss_T=exact_divergence(student_TK, teacher_TK, mask_TK, self.beta), counted=counted)


def exact_divergence(student_TK: Tensor, teacher_TK: Tensor, mask_TK: Tensor, beta: float = REVERSE_KL) -> Tensor:
    """The divergence of p_S and q_S [T], 0 on an empty support; finite inputs, also where masked.

    Its gradient is the same for logits and for log-probs of any normaliser.
    """
    divergence_T = row_divergence(
        student_TK.masked_fill(~mask_TK, MASKED_LOGIT), teacher_TK.masked_fill(~mask_TK, MASKED_LOGIT), beta
    )
    # On an empty support both sides are uniform over what is masked, which is 0 to rounding alone.
    return divergence_T.masked_fill(~mask_TK.any(dim=-1), 0.0)


def teacher_outside_logprobs(teacher_TK: Tensor, mask_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the teacher's mass outside the support [T], and where it was raised to what can be told apart from 0.

    A reply holds log-probs, whose fp32 rounding is that of the logits they come from: 1 - Q_S is known to about
    `TEACHER_TAIL_RESOLUTION` and no better. Below, that much is taken: the divergence is then the exact one to a
    teacher that differs by less than it in total variation.
    """
    inside_T = teacher_TK.double().exp().masked_fill(~mask_TK, 0.0).sum(dim=-1)
    outside_T = 1.0 - inside_T
    floored_T = outside_T.clamp_min(TEACHER_TAIL_RESOLUTION)
    return floored_T.log().to(teacher_TK.dtype), outside_T < TEACHER_TAIL_RESOLUTION


def _with_bucket(
    inputs: LossInputs, student_TK: Tensor, teacher_TK: Tensor, mask_TK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both sides with one more column for everything outside, which is masked where the support is all there is."""
    outside_T = inputs.require("student_outside_logprobs_T")
    require_finite("student log-prob of what is outside the support", outside_T, inputs.valid_T, inputs)
    is_something_T = inputs.valid_T & (outside_T.detach() > MASKED_LOGIT / 2)
    teacher_T, is_floored_T = teacher_outside_logprobs(teacher_TK, mask_TK)
    columns = (
        (student_TK, outside_T.masked_fill(~is_something_T, 0.0)),
        (teacher_TK, teacher_T.masked_fill(~is_something_T, 0.0)),
        (mask_TK, is_something_T),
    )
    student_TK, teacher_TK, mask_TK = (torch.cat([left, right.unsqueeze(-1)], dim=-1) for left, right in columns)
    return student_TK, teacher_TK, mask_TK, is_floored_T & is_something_T


def policy_loss(student_TK: Tensor, teacher_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """-sum over S of stop_grad(w (log q - log p)) p / stop_grad(p), [T]; its value is the w-mean of log p / q.

    Gradient: sum over S of w (log p / q) grad log p, with the raw log-ratio and no centring.
    """
    advantage_TK = weight_TK * (teacher_TK - student_TK).detach()
    return -(advantage_TK * unit_ratio(student_TK)).sum(dim=-1)


def support_weights(
    student_TK: Tensor, teacher_TK: Tensor, mask_TK: Tensor, weight: SupportWeight, *, renormalize: bool
) -> Tensor:
    """w(v) without gradient, 0 outside the support: p, q or 1, divided by its sum over S if `renormalize`."""
    if weight is SupportWeight.UNIFORM:
        ones_TK = mask_TK.to(student_TK.dtype)
        return ones_TK / ones_TK.sum(dim=-1, keepdim=True).clamp_min(1) if renormalize else ones_TK
    logprobs_TK = (student_TK if weight is SupportWeight.STUDENT else teacher_TK).detach()
    logprobs_TK = renormalized(logprobs_TK, mask_TK) if renormalize else logprobs_TK
    return logprobs_TK.exp().masked_fill(~mask_TK, 0.0)


def renormalized(logprobs_TK: Tensor, mask_TK: Tensor) -> Tensor:
    """Log-probs that sum to 1 over each support; meaningless but finite outside it and on an empty one."""
    return logprobs_TK.masked_fill(~mask_TK, MASKED_LOGIT).log_softmax(dim=-1)
