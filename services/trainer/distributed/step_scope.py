"""How the parts of a step that ranks do by themselves become one step: the seam between the loop and a sharded student.

The loop adds up unnormalised gradients (`loss_sum.backward()`), divides once by `total`, then clips. Forward and
backward passes of a sharded student gather and scatter weights, so every rank has to run equally many, at the same
time: `num_rounds` is the most that any has, and a rank with fewer runs `idle_loss`, whose gradient is zero.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from services.trainer.diagnostics.means import Mean
from services.trainer.distributed.means import reduce_means
from services.trainer.distributed.pins import SharedPins
from services.trainer.distributed.process_group import TorchRanks
from services.trainer.distributed.ranks import together
from services.trainer.distributed.sharding import gathered, sharded_modules
from services.trainer.distributed.share import Share
from services.trainer.student import Student

Part = Callable[[], AbstractContextManager[None]]
"""Within, a signal ends the step at once; see `StopSignal.interruptible`."""


class StepScope(Protocol):
    """What the loop asks around the parts of a step. All are collective."""

    share: Share
    """Which of the step's prompts are this rank's."""

    def sampling(self, interruptible: Part) -> AbstractContextManager[None]:
        """Around sampling and scoring, in which ranks do different work and any may fail."""
        ...

    def finishing(self, interruptible: Part) -> AbstractContextManager[None]:
        """Around what is left of the gradient once everything has been scored."""
        ...

    def num_rounds(self, num_local: int) -> int:
        """How many forward and backward passes every rank runs, where this one has `num_local` micro-batches."""
        ...

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around one forward and backward pass; `is_last` of the rounds."""
        ...

    def idle_loss(self) -> Tensor:
        """A loss of zero that touches every weight, for a round in which this rank has nothing left."""
        ...

    def total(self, value: int) -> int:
        """The sum over ranks, say of what the gradient is divided by."""
        ...

    def means(self, means: Mapping[str, Mean]) -> dict[str, Mean]:
        """Metrics over all ranks."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank; see `Ranks.gather`."""
        ...


class LocalStep:
    """A student that one process has to itself."""

    share = Share()

    def sampling(self, interruptible: Part) -> AbstractContextManager[None]:
        return interruptible()

    def finishing(self, interruptible: Part) -> AbstractContextManager[None]:
        return interruptible()

    def num_rounds(self, num_local: int) -> int:
        return num_local

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def idle_loss(self) -> Tensor:
        """Never asked for: there is nobody to wait for."""
        return torch.zeros((), requires_grad=True)

    def total(self, value: int) -> int:
        return value

    def means(self, means: Mapping[str, Mean]) -> dict[str, Mean]:
        return dict(means)

    def gather(self, value: Any) -> list[Any]:
        return [value]


class ShardedStep:
    """A student in shards. Gradients are summed over ranks in fp32, after each round or once at the end of a step.

    After each round, a rank holds a shard of the gradient only. Once at the end, it holds a whole gradient in fp32 and
    sends it one time. While ranks sample, each has a whole copy of the weights.
    """

    def __init__(
        self, ranks: TorchRanks, student: Student, *, reduces_each_round: bool = True, pins: SharedPins | None = None
    ) -> None:
        self.share = Share(rank=ranks.rank, num_ranks=ranks.num_ranks)
        self._ranks = ranks
        self._student = student
        self._reduces_each_round = reduces_each_round
        self._pins = pins

    @contextmanager
    def sampling(self, interruptible: Part) -> Iterator[None]:
        """All ranks leave it, or all raise the same error; see `together`."""
        if self._pins is not None:
            self._pins.agree()
        with gathered(self._student.model, self._ranks), together(self._ranks), interruptible():
            yield

    def finishing(self, interruptible: Part) -> AbstractContextManager[None]:
        # A rank that left here would leave the others in the middle of a collective: signals are heard afterwards.
        return self._ranks.in_step()

    def num_rounds(self, num_local: int) -> int:
        return self._ranks.most(num_local)

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """`RankLostError` where another rank is gone in the middle of it."""
        with self._ranks.in_step():
            for module in sharded_modules(self._student.model):
                module.set_requires_gradient_sync(is_last or self._reduces_each_round, recurse=False)
            yield

    def idle_loss(self) -> Tensor:
        return self._student.idle_loss()

    def total(self, value: int) -> int:
        return self._ranks.total(value)

    def means(self, means: Mapping[str, Mean]) -> dict[str, Mean]:
        return reduce_means(self._ranks, means)

    def gather(self, value: Any) -> list[Any]:
        return self._ranks.gather(value)


def step_scope(
    ranks: object, student: Student, *, reduces_each_round: bool = True, pins: SharedPins | None = None
) -> StepScope:
    """The scope that fits how many ranks there are. `pins` are agreed on before each step."""
    if not isinstance(ranks, TorchRanks):
        return LocalStep()
    return ShardedStep(ranks, student, reduces_each_round=reduces_each_round, pins=pins)
