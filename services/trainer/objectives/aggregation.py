"""From losses per position to one sum: validity, staleness weight, and what the mean is over.

T positions. `token_mean` weights every valid position 1, `sequence_mean` 1 / (valid positions of its rollout). The
loop divides the sum by `denominator` of the whole optimizer batch, so a step does not depend on how it was split.
Empty supports add zero and stay in the denominator.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.trainer.diagnostics.means import Mean
from services.trainer.objectives.checks import require_finite
from services.trainer.objectives.config import Aggregation
from services.trainer.objectives.contract import LossInputs, LossOutput


def denominator(aggregation: Aggregation, positions_per_rollout: Sequence[int]) -> int:
    """What the sum over a whole optimizer batch is divided by: its valid positions, or its rollouts that have any."""
    if aggregation is Aggregation.SEQUENCE_MEAN:
        return sum(1 for count in positions_per_rollout if count > 0)
    return sum(positions_per_rollout)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """How an objective's position losses become its output."""

    aggregation: Aggregation = Aggregation.TOKEN_MEAN
    staleness_cap: float | None = None

    def __call__(self, loss_T: Tensor, inputs: LossInputs, sums: Mapping[str, Tensor]) -> LossOutput:
        """Weights and sums `loss_T`, which is finite at invalid positions too; `sums` are metrics over valid ones."""
        valid_T = inputs.valid_T
        sums = dict(sums)
        if self.staleness_cap is not None:
            weight_T = staleness_weights(inputs, self.staleness_cap)
            loss_T = loss_T * weight_T
            sums["loss/staleness_weight"] = weight_T.sum()
            sums["loss/staleness_capped_fraction"] = (weight_T >= self.staleness_cap).sum()
        loss_T = loss_T.masked_fill(~valid_T, 0.0)
        require_finite("the loss", loss_T, valid_T)
        weight_T = self._position_weights(inputs, loss_T)
        loss_sum = (loss_T * weight_T).sum()
        return LossOutput(
            loss_sum=loss_sum,
            position_loss_T=loss_T.detach().masked_fill(~valid_T, torch.nan),
            num_positions=int(valid_T.sum()),
            metrics=_means(loss_sum.detach(), weight_T.sum(), valid_T.sum(), sums),
        )

    def _position_weights(self, inputs: LossInputs, loss_T: Tensor) -> Tensor:
        if self.aggregation is Aggregation.TOKEN_MEAN:
            return inputs.valid_T.to(loss_T.dtype)
        lengths_T = inputs.require("rollout_num_positions_T").to(loss_T.dtype)
        return lengths_T.clamp_min(1).reciprocal().masked_fill(~inputs.valid_T, 0.0)


def staleness_weights(inputs: LossInputs, cap: float) -> Tensor:
    """c_t = stop_grad(min(p_learner(y_t) / p_rollout(y_t), cap)), 0 at invalid positions.

    Sums over a support are exact expectations under the learner and need no ratio; c_t only corrects for positions
    being visited by an older student.
    """
    valid_T = inputs.valid_T
    learner_T, rollout_T = inputs.require("student_sampled_logprobs_T").detach(), inputs.require("rollout_logprobs_T")
    require_finite("student log-prob of the sampled token", learner_T, valid_T)
    require_finite("rollout log-prob of the sampled token", rollout_T, valid_T)
    log_ratio_T = learner_T - rollout_T
    # Compared as logarithms, because exp of a large difference would be infinite before it is capped.
    capped_T = log_ratio_T >= math.log(cap)
    return log_ratio_T.masked_fill(capped_T, 0.0).exp().masked_fill(capped_T, cap).masked_fill(~valid_T, 0.0)


def _means(loss_sum: Tensor, weight_sum: Tensor, num_valid: Tensor, sums: Mapping[str, Tensor]) -> dict[str, Mean]:
    """Reads all sums from the device at once."""
    names = list(sums)
    totals = torch.stack([tensor.double() for tensor in (loss_sum, weight_sum, num_valid, *sums.values())]).tolist()
    metrics = {"loss/objective": Mean(total=totals[0], count=totals[1])}
    for name, total in zip(names, totals[3:], strict=True):
        metrics[name] = Mean(total=total, count=totals[2])
    return metrics
