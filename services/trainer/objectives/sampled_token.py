"""Distillation by the sampled token alone (eq 3): the teacher's log-ratio as a per-token advantage.

T positions. Differentiating log p(y) - log q(y) directly looks like eq 3 and trains nothing: grad log p has zero
expectation under p. The log-ratio has to be held constant.
"""

from dataclasses import dataclass

from torch import Tensor

from services.trainer.objectives.checks import require_finite
from services.trainer.objectives.config import ObjectiveConfig
from services.trainer.objectives.contract import LossInputs, Needs, PositionLosses


def build(config: ObjectiveConfig) -> "SampledToken":
    del config
    return SampledToken()


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledToken:
    """-stop_grad(log q(y) - log p(y)) p(y) / stop_grad(p(y)).

    Gradient: (log p(y) / q(y)) grad log p(y), whose expectation over y ~ p is the gradient of KL(p || q) (eq 4). With
    the reduction's staleness weight it is eq 3's w_t. p / stop_grad(p) has the gradient of log p and the value 1, so
    that the loss reads as eq 3's own term, log p(y) - log q(y).
    """

    @property
    def needs(self) -> Needs:
        return Needs(sampled=True, teacher_sampled=True)

    def __call__(self, inputs: LossInputs) -> PositionLosses:
        teacher_T = inputs.require("teacher_sampled_logprobs_T")
        require_finite("teacher log-prob of the sampled token", teacher_T, inputs.valid_T, inputs)
        student_T = sampled_logprobs(inputs)
        advantage_T = teacher_T.masked_fill(~inputs.valid_T, 0.0) - student_T.detach()
        return PositionLosses(loss_T=-advantage_T * unit_ratio(student_T))


def sampled_logprobs(inputs: LossInputs) -> Tensor:
    """The student's log-probs [T] of the sampled tokens, checked, and 0 where a position does not train."""
    student_T = inputs.require("student_sampled_logprobs_T")
    require_finite("student log-prob of the sampled token", student_T, inputs.valid_T, inputs)
    return student_T.masked_fill(~inputs.valid_T, 0.0)


def unit_ratio(logprobs: Tensor) -> Tensor:
    """p / stop_grad(p): 1, with the gradient of log p; the PPO ratio of a batch that is updated once."""
    return (logprobs - logprobs.detach()).exp()
