"""The student's entropy as a bonus, against collapse (5.2). T positions."""

from dataclasses import dataclass

from services.trainer.objectives.checks import require_finite
from services.trainer.objectives.contract import LossInputs, Needs, PositionLosses


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyBonus:
    """-H(p) over the whole vocabulary. Gradient with respect to a logit: p (log p + H)."""

    @property
    def needs(self) -> Needs:
        return Needs(entropy=True)

    def __call__(self, inputs: LossInputs) -> PositionLosses:
        entropy_T = inputs.require("student_entropy_T")
        require_finite("student entropy", entropy_T, inputs.valid_T, inputs)
        return PositionLosses(loss_T=-entropy_T.masked_fill(~inputs.valid_T, 0.0))
