"""How the micro-batches of all ranks become one gradient: the seam between the loop and whatever shards the student.

The loop adds up unnormalised gradients (`loss_sum.backward()`), divides once by `total`, then clips. Forward and
backward passes of a sharded student gather and scatter weights, so every rank has to run equally many: `num_rounds` is
the most that any has, and a rank with fewer runs `idle` ones, whose gradient is zero.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from opd.errors import OpdError
from services.trainer.distributed.process_group import TorchRanks
from services.trainer.distributed.sharding import sharded_modules
from services.trainer.student import Student


class GradientScope(Protocol):
    """What the loop asks around its backward passes."""

    def num_rounds(self, num_local: int) -> int:
        """How many forward and backward passes every rank runs, where this one has `num_local` micro-batches."""
        ...

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around one forward and backward pass; `is_last` of the step's rounds."""
        ...

    def idle_loss(self) -> Tensor:
        """A loss of zero that touches every weight, for a round in which this rank has nothing left."""
        ...

    def total(self, local_denominator: int) -> int:
        """What the summed gradient is divided by: the denominators of all ranks."""
        ...


class LocalGradients:
    """A student that one process has to itself."""

    def num_rounds(self, num_local: int) -> int:
        return num_local

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def idle_loss(self) -> Tensor:
        """Never asked for: there is nobody to wait for."""
        return torch.zeros((), requires_grad=True)

    def total(self, local_denominator: int) -> int:
        return local_denominator


class ShardedGradients:
    """A student in shards. Gradients are summed over ranks in fp32, after each round or once at the end of a step.

    After each round, a rank holds a shard of the gradient only. Once at the end, it holds a whole gradient in fp32 and
    sends it one time.
    """

    def __init__(self, ranks: TorchRanks, student: Student, *, reduces_each_round: bool) -> None:
        self._ranks = ranks
        self._student = student
        self._reduces_each_round = reduces_each_round
        self._modules: list[FSDPModule] = sharded_modules(student.model)

    def num_rounds(self, num_local: int) -> int:
        return self._ranks.most(num_local)

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """`RankLostError` where another rank is gone in the middle of it."""
        self._ranks.check()
        for module in self._modules:
            module.set_requires_gradient_sync(is_last or self._reduces_each_round, recurse=False)
        try:
            yield
        except (OpdError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            self._ranks.explain(error)
            raise

    def idle_loss(self) -> Tensor:
        return self._student.idle_loss()

    def total(self, local_denominator: int) -> int:
        return self._ranks.total(local_denominator)


def gradient_scope(ranks: Any, student: Student, *, reduces_each_round: bool = True) -> GradientScope:
    """The scope that fits how many ranks there are."""
    if not isinstance(ranks, TorchRanks):
        return LocalGradients()
    return ShardedGradients(ranks, student, reduces_each_round=reduces_each_round)
