"""Distillation by the sampled token alone (eq 3): the teacher's log-ratio as a per-token advantage.

T positions. Differentiating log p(y) - log q(y) directly looks like eq 3 and trains nothing: grad log p has zero
expectation under p. The log-ratio has to be held constant.
"""

from dataclasses import dataclass, field

from services.trainer.objectives.aggregation import Reduction
from services.trainer.objectives.checks import require_finite
from services.trainer.objectives.contract import LossInputs, LossOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledTokenObjective:
    """-w stop_grad(log q(y) - log p(y)) p(y) / stop_grad(p(y)), with w the staleness weight (1 without a cap).

    Gradient: w (log p(y) / q(y)) grad log p(y); with w = 1 its expectation over y ~ p is the gradient of KL(p || q)
    (eq 4). p / stop_grad(p) has the gradient of log p and the value 1, so that the loss reads as eq 3's own term,
    log p(y) - log q(y).
    """

    reduction: Reduction = field(default_factory=Reduction)

    @property
    def needs_student_ids(self) -> bool:
        return False

    @property
    def needs_teacher_ids(self) -> bool:
        return False

    @property
    def needs_teacher_top_k(self) -> bool:
        return False

    @property
    def needs_sampled(self) -> bool:
        return True

    @property
    def needs_full_vocabulary(self) -> bool:
        return False

    def __call__(self, inputs: LossInputs) -> LossOutput:
        student_T = inputs.require("student_sampled_logprobs_T")
        teacher_T = inputs.require("teacher_sampled_logprobs_T")
        require_finite("student log-prob of the sampled token", student_T, inputs.valid_T)
        require_finite("teacher log-prob of the sampled token", teacher_T, inputs.valid_T)
        student_T = student_T.masked_fill(~inputs.valid_T, 0.0)
        advantage_T = teacher_T.masked_fill(~inputs.valid_T, 0.0) - student_T.detach()
        loss_T = -advantage_T * (student_T - student_T.detach()).exp()
        return self.reduction(loss_T, inputs, {})
