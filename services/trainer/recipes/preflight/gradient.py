"""One batch through the student, forward and back, without changing it: loss, gradient norm, coherence.

Coherence is the norm of the mean of per-rollout gradients over the mean of their norms: 1 where all rollouts push the
same way, 1/sqrt(n) for n pushes that have nothing to do with each other. 6.2 of the paper supposes that it is low where
a teacher's large token rewards come to nothing.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.trainer.batch import ScoredRollout, build_batch, micro_batches
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
    total = denominator(aggregation, [item.num_trained_tokens for item in scored])
    loss_sum, gradient = 0.0, _Sum()
    for part in micro_batches(scored, max_micro_batch_tokens):
        value, tensors = _gradient(student, loss, part, total)
        loss_sum += value
        gradient.add(tensors)
    probe = scored[:num_probe_rollouts]
    mean, norms = _Sum(), []
    for item in probe:
        _, tensors = _gradient(student, loss, [item], item.num_trained_tokens)
        norms.append(_norm(tensors))
        mean.add(tensors)
    total_norm = sum(norms)
    return BatchGradient(
        loss=loss_sum,
        grad_norm=gradient.norm(),
        coherence=mean.norm() / total_norm if total_norm else None,
        unrelated_coherence=len(probe) ** -0.5,
        num_rollouts=len(scored),
        num_probe_rollouts=len(probe),
    )


def _gradient(
    student: Student, loss: DistillLoss, scored: Sequence[ScoredRollout], total: float
) -> tuple[float, list[Tensor]]:
    parameters = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    mean = loss(build_batch(scored, student.device)).loss_sum / total
    found = torch.autograd.grad(mean, parameters, allow_unused=True)
    return float(mean.detach()), [tensor for tensor in found if tensor is not None]


class _Sum:
    """Adds up gradients tensor by tensor: one copy of the student's size, whatever is added."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def add(self, tensors: Sequence[Tensor]) -> None:
        if not self._tensors:
            self._tensors = [tensor.clone() for tensor in tensors]
            return
        for total, tensor in zip(self._tensors, tensors, strict=True):
            total += tensor

    def norm(self) -> float:
        return _norm(self._tensors)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
