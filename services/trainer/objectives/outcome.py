"""The reward of verified answers as a loss at the sampled tokens, each compared with its group.

T positions. The ratio of PPO is 1, since a batch is updated once, and nothing is clipped.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from services.trainer.objectives.checks import require_finite
from services.trainer.objectives.contract import LossInputs, Needs, PositionLosses
from services.trainer.objectives.sampled_token import sampled_logprobs, unit_ratio

STD_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """-stop_grad(A) p(y) / stop_grad(p(y)), A the advantage of the rollout in its group.

    Gradient: -A grad log p(y), with the reduction's staleness weight as the ratio to the sampler.
    """

    @property
    def needs(self) -> Needs:
        return Needs(sampled=True, advantage=True)

    def __call__(self, inputs: LossInputs) -> PositionLosses:
        advantage_T = inputs.require("advantage_T")
        require_finite("advantage", advantage_T, inputs.valid_T, inputs)
        student_T = sampled_logprobs(inputs)
        advantage_T = advantage_T.to(student_T.dtype).masked_fill(~inputs.valid_T, 0.0)
        return PositionLosses(loss_T=-advantage_T * unit_ratio(student_T))


def group_advantages(rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
    """A = (r - mean) / (std + 1e-6) within each group, 0 where all of a group are equal.

    The standard deviation divides by n - 1, as the common trainers take it.
    """
    members: defaultdict[int, list[float]] = defaultdict(list)
    for reward, group in zip(rewards, groups, strict=True):
        members[group].append(reward)
    moments = {group: (statistics.fmean(values), _spread(values)) for group, values in members.items()}
    return [
        (reward - moments[group][0]) / (moments[group][1] + STD_FLOOR) if moments[group][1] else 0.0
        for reward, group in zip(rewards, groups, strict=True)
    ]


def _spread(values: Sequence[float]) -> float:
    """Exactly 0 for equal values."""
    return statistics.stdev(values) if min(values) != max(values) else 0.0
