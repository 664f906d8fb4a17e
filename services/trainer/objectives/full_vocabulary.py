"""Distillation over the whole vocabulary (eq 4): the divergence itself, with its exact gradient.

T positions. The divergence is summed where the logits are, a chunk of rows at a time (`opd.ops.full_divergence`), so
nothing of the size of the vocabulary gets here; what is left is validity.
"""

from dataclasses import dataclass

from services.trainer.objectives.checks import require_finite
from services.trainer.objectives.config import ObjectiveConfig
from services.trainer.objectives.contract import LossInputs, Needs, PositionLosses


def build(config: ObjectiveConfig) -> "FullVocabulary":
    del config
    return FullVocabulary()


@dataclass(frozen=True, kw_only=True, slots=True)
class FullVocabulary:
    """The divergence over all defined ids; reverse KL has the gradient p (log p / q - KL) with respect to a logit.

    The other forms and their gradients stand at `opd.ops.row_divergence`.
    """

    @property
    def needs(self) -> Needs:
        return Needs(full_vocabulary=True)

    def __call__(self, inputs: LossInputs) -> PositionLosses:
        divergence_T = inputs.require("full_divergence_T")
        require_finite("divergence over the vocabulary", divergence_T, inputs.valid_T, inputs)
        return PositionLosses(loss_T=divergence_T.masked_fill(~inputs.valid_T, 0.0))
