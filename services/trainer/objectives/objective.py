"""Terms added up to what is differentiated: each with its weight, and at the positions it is meant for.

T positions. The teacher's signal trains the supervised ones, an outcome all or those beyond, an entropy bonus all.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from services.trainer.objectives.aggregation import Counted, Reduction
from services.trainer.objectives.contract import LossInputs, LossOutput, Needs, Term


class Region(StrEnum):
    """Which valid positions a term trains."""

    ALL = "all"
    SUPERVISED = "supervised"
    """Those the teacher's signal is to train: up to the horizon."""
    BEYOND = "beyond"
    """The others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedTerm:
    """A term of a sum; `name` is what its own mean is reported under, `loss/NAME`."""

    name: str
    term: Term
    weight: float = 1.0
    region: Region = Region.ALL


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """sum over terms of weight * loss_t at the positions of its region; the gradient is the same sum."""

    terms: tuple[WeightedTerm, ...]
    reduction: Reduction = field(default_factory=Reduction)

    @property
    def needs(self) -> Needs:
        joined = self.reduction.needs
        for part in self.terms:
            joined = joined | part.term.needs
        return joined

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Raises `NonFiniteError` naming the first valid position with a value that is not finite."""
        total_T = torch.zeros_like(inputs.valid_T, dtype=torch.float32)
        counted: dict[str, Counted] = {}
        for part in self.terms:
            valid_T = _positions(inputs, part.region)
            found = part.term(dataclasses.replace(inputs, valid_T=valid_T))
            loss_T = found.loss_T.masked_fill(~valid_T, 0.0)
            num_valid = valid_T.sum()
            counted |= {name: (total, num_valid) for name, total in found.counted.items()}
            if len(self.terms) > 1:
                counted[f"loss/{part.name}"] = loss_T.detach().sum(), num_valid
            # Zero in fp32 takes over the precision of what is added to it.
            total_T = total_T + part.weight * loss_T
        return self.reduction(total_T, inputs, counted)


def _positions(inputs: LossInputs, region: Region) -> Tensor:
    supervised_T = inputs.supervised_T
    if region is Region.ALL:
        return inputs.valid_T
    if supervised_T is None:
        return inputs.valid_T if region is Region.SUPERVISED else torch.zeros_like(inputs.valid_T)
    return inputs.valid_T & (supervised_T if region is Region.SUPERVISED else ~supervised_T)
