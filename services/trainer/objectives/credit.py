"""What a position answers for beyond its own divergence, and how much its depth counts: terms made of terms.

T positions of whole rollouts, in any order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.ops.running_sums import running_sums
from services.trainer.objectives.contract import LossInputs, Needs, PositionLosses, Term
from services.trainer.objectives.sampled_token import sampled_logprobs, unit_ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class Discounted:
    """The term's loss at response position t times `discount` to the power of t; the gradient likewise.

    The mean's denominator stays the number of positions: a discount takes weight from the back and gives none to the
    front.
    """

    term: Term
    discount: float

    @property
    def needs(self) -> Needs:
        return self.term.needs

    def __call__(self, inputs: LossInputs) -> PositionLosses:
        found = self.term(inputs)
        weight_T = self.discount ** inputs.require("position_T").to(found.loss_T.dtype)
        return PositionLosses(loss_T=found.loss_T * weight_T, counted=found.counted)


@dataclass(frozen=True, kw_only=True, slots=True)
class ToGo:
    """The term's loss, with what later positions lose credited to the sampled token; the value is the term's own.

    Gradient: grad loss_t + stop_grad(sum over s > t of loss_s) grad log p(y_t). Over rollouts y ~ p its expectation is
    the gradient of E[sum over t of loss_t], the visited prefixes included, which `credit = local` holds constant.
    """

    term: Term

    @property
    def needs(self) -> Needs:
        return self.term.needs | Needs(sampled=True)

    def __call__(self, inputs: LossInputs) -> PositionLosses:
        found = self.term(inputs)
        own_T = found.loss_T.detach().masked_fill(~inputs.valid_T, 0.0)
        later_T = later_sums(own_T, inputs.require("rollout_index_T"), inputs.require("position_T"))
        loss_T = found.loss_T + later_T * (unit_ratio(sampled_logprobs(inputs)) - 1.0)
        return PositionLosses(loss_T=loss_T, counted=found.counted)


def later_sums(values_T: Tensor, rollout_index_T: Tensor, position_T: Tensor) -> Tensor:
    """For each position the sum of `values_T` over later positions of its rollout, summed in float64."""
    if not values_T.numel():
        return values_T
    order_T = torch.argsort(rollout_index_T * (position_T.max() + 1) + position_T)
    sorted_T = values_T[order_T].double()
    totals_B = torch.zeros(int(rollout_index_T.max()) + 1, dtype=torch.float64, device=values_T.device)
    ends_B = running_sums(totals_B.index_add(0, rollout_index_T[order_T], sorted_T))
    later_T = torch.empty_like(sorted_T)
    later_T[order_T] = ends_B[rollout_index_T[order_T]] - running_sums(sorted_T)
    return later_T.to(values_T.dtype)
