"""What one process of a run can ask the others. A run in one process asks nobody, so no other code has two ways.

Every method is collective: all ranks call the same ones in the same order, and all get the same answer. Values are
small and travel as JSON or integers, never as pickles.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from opd.errors import OpdError, from_code
from services.trainer.stop import StopRequested


class Ranks(Protocol):
    """The processes of one run."""

    @property
    def rank(self) -> int:
        """Which one this is, from 0; rank 0 logs, saves, evaluates and serves the status."""
        ...

    @property
    def num_ranks(self) -> int: ...

    def total(self, value: int) -> int:
        """The sum over all ranks, exact."""
        ...

    def most(self, value: int) -> int:
        """The largest over all ranks."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, by rank; floats come back bit-equal."""
        ...


class Alone:
    """A run in one process."""

    rank = 0
    num_ranks = 1

    def total(self, value: int) -> int:
        return value

    def most(self, value: int) -> int:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """A part in which ranks do different work: all leave it, or all raise what the lowest of those that failed raised.

    Without it a rank whose scoring failed would leave the others waiting in the next collective. An error that is not
    ours passes at once: it ends this process, which the others notice.
    """
    failure: OpdError | StopRequested | None = None
    try:
        yield
    except (OpdError, StopRequested) as error:
        failure = error
    for rank, told in enumerate(ranks.gather(_told(failure))):
        if told is not None:
            raise failure if rank == ranks.rank and failure is not None else _heard(rank, told)


def _told(failure: OpdError | StopRequested | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    if isinstance(failure, StopRequested):
        return {"signal": failure.number}
    return {"code": failure.code, "message": failure.message, "retry_after_s": failure.retry_after_s}


def _heard(rank: int, told: dict[str, Any]) -> OpdError | StopRequested:
    if "signal" in told:
        return StopRequested(told["signal"])
    return from_code(told["code"], f"rank {rank}: {told['message']}", told["retry_after_s"])
