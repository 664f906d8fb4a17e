"""Distillation over the whole vocabulary (eq 4): the reverse KL itself, with its exact gradient.

T positions. The divergence is summed where the logits are, a chunk of rows at a time (`opd.ops.full_reverse_kl`), so
nothing of the size of the vocabulary gets here; what is left is validity, staleness and the sum.
"""

from dataclasses import dataclass, field

from services.trainer.objectives.aggregation import Reduction
from services.trainer.objectives.checks import require_finite
from services.trainer.objectives.contract import LossInputs, LossOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class FullVocabularyObjective:
    """KL(p || q) over all defined ids. Gradient with respect to a logit: p (log p / q - KL)."""

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
        return self.reduction.staleness_cap is not None

    @property
    def needs_full_vocabulary(self) -> bool:
        return True

    def __call__(self, inputs: LossInputs) -> LossOutput:
        kl_T = inputs.require("full_reverse_kl_T")
        require_finite("reverse KL over the vocabulary", kl_T, inputs.valid_T)
        return self.reduction(kl_T.masked_fill(~inputs.valid_T, 0.0), inputs, {})
