"""One batch through the student, forward and back, without changing it: loss, gradient norm, coherence.

Coherence is as in `diagnostics/coherence.py`, of mean losses per rollout: long responses count no more than short ones.
6.2 of the paper supposes that it is low where a teacher's large token rewards come to nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from services.trainer.batch import ScoredRollout, build_batch, micro_batches
from services.trainer.diagnostics.coherence import gradient_coherence, gradient_norm
from services.trainer.loss import DistillLoss
from services.trainer.objectives.aggregation import denominator
from services.trainer.objectives.config import Aggregation
from services.trainer.student import Student


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchGradient:
    """What a first step would see."""

    loss: float
    """Nats per position (per rollout for `sequence_mean`)."""
    grad_norm: float
    """Before clipping."""
    coherence: float | None
    """None where no rollout of the probe has a gradient."""
    unrelated_coherence: float
    """1/sqrt(n): what n unrelated gradients of equal norm would have."""
    num_rollouts: int
    num_probe_rollouts: int


def batch_gradient(
    student: Student,
    loss: DistillLoss,
    scored: Sequence[ScoredRollout],
    *,
    aggregation: Aggregation,
    max_micro_batch_tokens: int,
    num_probe_rollouts: int,
) -> BatchGradient:
    """Leaves no gradient behind. `NonFiniteError` for a rollout that brings a number that is none."""
    parameters = [parameter for parameter in student.model.parameters() if parameter.requires_grad]

    def mean_loss(part: Sequence[ScoredRollout], total: float) -> Tensor:
        return loss(build_batch(part, student.device)).loss_sum / total

    total = denominator(aggregation, [item.num_trained_tokens for item in scored])
    split = micro_batches(scored, max_micro_batch_tokens, shares_prompts=student.shares_prompts)
    parts = (partial(mean_loss, part, total) for part in split)
    loss_sum, grad_norm = _sums(parts, parameters)
    probe = scored[:num_probe_rollouts]
    each = (partial(mean_loss, [item], item.num_trained_tokens) for item in probe)
    return BatchGradient(
        loss=loss_sum,
        grad_norm=grad_norm,
        coherence=gradient_coherence(each, parameters),
        unrelated_coherence=len(probe) ** -0.5,
        num_rollouts=len(scored),
        num_probe_rollouts=len(probe),
    )


def _sums(losses: Iterable[Callable[[], Tensor]], parameters: Sequence[Tensor]) -> tuple[float, float]:
    """The sum of the losses and the norm of its gradient; one copy of the student's size, whatever is added."""
    total, sums = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for loss in losses:
        value = loss()
        total += float(value.detach())
        gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
        for gradient_sum, gradient in zip(sums, gradients, strict=True):
            gradient_sum += gradient
    return total, gradient_norm(sums)
