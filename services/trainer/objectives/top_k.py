"""Distillation on a small support per position (eq 5): the exact divergence, and the reference code's policy form.

T positions, K support columns. p and q are student and teacher over the full vocabulary, p_S and q_S renormalised on
the support S, P_S and Q_S their masses on it, D = KL(p_S || q_S). With w = p_S,
policy = exact + (D + log P_S / Q_S) grad log P_S: the policy form also moves mass into and out of the support. The two
agree when S is the whole vocabulary.
"""

from dataclasses import dataclass, field

from torch import Tensor

from opd.ops import MASKED_LOGIT
from services.trainer.objectives.aggregation import Reduction
from services.trainer.objectives.checks import require_finite
from services.trainer.objectives.config import GradientForm, Support, SupportWeight
from services.trainer.objectives.contract import LossInputs, LossOutput
from services.trainer.objectives.supports import NEEDS_STUDENT_IDS, NEEDS_TEACHER_IDS, NEEDS_TEACHER_TOP_K


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKObjective:
    """Reverse KL on the support, in either gradient form."""

    gradient: GradientForm = GradientForm.EXACT
    support: Support = Support.STUDENT
    weight: SupportWeight = SupportWeight.STUDENT
    renormalize: bool = True
    reduction: Reduction = field(default_factory=Reduction)

    @property
    def needs_student_ids(self) -> bool:
        return self.support in NEEDS_STUDENT_IDS

    @property
    def needs_teacher_ids(self) -> bool:
        return self.support in NEEDS_TEACHER_IDS

    @property
    def needs_teacher_top_k(self) -> bool:
        return self.support in NEEDS_TEACHER_TOP_K

    @property
    def needs_sampled(self) -> bool:
        return self.reduction.staleness_cap is not None

    @property
    def needs_full_vocabulary(self) -> bool:
        return False

    def __call__(self, inputs: LossInputs) -> LossOutput:
        student_TK, teacher_TK = inputs.require("student_logprobs_TK"), inputs.require("teacher_logprobs_TK")
        mask_TK = inputs.require("support_mask_TK") & inputs.valid_T.unsqueeze(-1)
        require_finite("student log-prob", student_TK, mask_TK, inputs.support_ids_TK)
        require_finite("teacher log-prob", teacher_TK, mask_TK, inputs.support_ids_TK)
        # Masked columns may hold NaN; they are replaced before any arithmetic, since 0 * NaN is NaN on the way back.
        student_TK, teacher_TK = student_TK.masked_fill(~mask_TK, 0.0), teacher_TK.masked_fill(~mask_TK, 0.0)
        if self.gradient is GradientForm.EXACT:
            loss_T = exact_divergence(student_TK, teacher_TK, mask_TK)
        else:
            weight_TK = support_weights(student_TK, teacher_TK, mask_TK, self.weight, renormalize=self.renormalize)
            loss_T = policy_loss(student_TK, teacher_TK, weight_TK)
        sizes_T = mask_TK.sum(dim=-1)
        sums = {
            "loss/support_size": sizes_T.sum(),
            "loss/small_support_fraction": ((sizes_T < 2) & inputs.valid_T).sum(),
        }
        return self.reduction(loss_T, inputs, sums)


def exact_divergence(student_TK: Tensor, teacher_TK: Tensor, mask_TK: Tensor) -> Tensor:
    """KL(p_S || q_S) [T], 0 on an empty support; finite inputs, also where masked.

    Gradient: sum over S of p_S (log p_S / q_S - D) grad log p. It is the same for logits and for log-probs of any
    normaliser, sums to zero over S, and vanishes identically on a support of one id.
    """
    student_TK, teacher_TK = renormalized(student_TK, mask_TK), renormalized(teacher_TK, mask_TK)
    log_ratio_TK = (student_TK - teacher_TK).masked_fill(~mask_TK, 0.0)
    return (student_TK.exp() * log_ratio_TK).sum(dim=-1)


def policy_loss(student_TK: Tensor, teacher_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """-sum over S of stop_grad(w (log q - log p)) p / stop_grad(p), [T]; its value is the w-mean of log p / q.

    Gradient: sum over S of w (log p / q) grad log p, with the raw log-ratio and no centring.
    """
    advantage_TK = weight_TK * (teacher_TK - student_TK).detach()
    return -(advantage_TK * (student_TK - student_TK.detach()).exp()).sum(dim=-1)


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
