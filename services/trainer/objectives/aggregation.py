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
from services.trainer.objectives.contract import LossInputs, LossOutput, Needs

Counted = tuple[Tensor, Tensor]
"""A metric's sum and the number of positions it is over."""


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

    @property
    def needs(self) -> Needs:
        return Needs(sampled=self.staleness_cap is not None)

    def __call__(self, loss_T: Tensor, inputs: LossInputs, counted: Mapping[str, Counted]) -> LossOutput:
        """Weights and sums `loss_T`, which is finite at invalid positions too."""
        valid_T = inputs.valid_T
        num_valid = valid_T.sum()
        counted = dict(counted)
        if self.staleness_cap is not None:
            weight_T = staleness_weights(inputs, self.staleness_cap)
            loss_T = loss_T * weight_T
            counted["loss/staleness_weight"] = weight_T.sum(), num_valid
            counted["loss/staleness_capped_fraction"] = (weight_T >= self.staleness_cap).sum(), num_valid
        loss_T = loss_T.masked_fill(~valid_T, 0.0)
        require_finite("the loss", loss_T, valid_T, inputs)
        weight_T = self._position_weights(inputs, loss_T)
        loss_sum = (loss_T * weight_T).sum()
        counted["loss/objective"] = loss_sum.detach(), weight_T.sum()
        return LossOutput(
            loss_sum=loss_sum,
            position_loss_T=loss_T.detach().masked_fill(~valid_T, torch.nan),
            num_positions=int(num_valid),
            metrics=_means(counted),
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
    require_finite("student log-prob of the sampled token", learner_T, valid_T, inputs)
    require_finite("rollout log-prob of the sampled token", rollout_T, valid_T, inputs)
    log_ratio_T = learner_T - rollout_T
    # Compared as logarithms, because exp of a large difference would be infinite before it is capped.
    capped_T = log_ratio_T >= math.log(cap)
    return log_ratio_T.masked_fill(capped_T, 0.0).exp().masked_fill(capped_T, cap).masked_fill(~valid_T, 0.0)


def _means(counted: Mapping[str, Counted]) -> dict[str, Mean]:
    """Reads all sums and counts from the device at once."""
    flat = torch.stack([number.double() for pair in counted.values() for number in pair]).tolist()
    return {
        name: Mean(total=total, count=count) for name, total, count in zip(counted, flat[::2], flat[1::2], strict=True)
    }
