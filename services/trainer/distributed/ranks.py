"""What one process of a run can ask the others. A run in one process asks nobody, so no other code has two ways.

Every method is collective: all ranks call the same ones in the same order, and all get the same answer. Values are
small and travel as JSON or integers, never as pickles.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from opd.errors import ConfigError, InternalError, OpdError, RankLostError, first_line, from_code
from services.trainer.memory import is_out_of_memory
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

    def check(self) -> None:
        """`RankLostError` where nothing can be done together any more. Not collective."""
        ...

    def in_step(self) -> AbstractContextManager[None]:
        """Around what all ranks go through alike. Whoever leaves it by an error has left the others for good."""
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

    def check(self) -> None:
        """There is nobody to lose."""

    def in_step(self) -> AbstractContextManager[None]:
        return nullcontext()


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """A part in which ranks do different work: all leave it, or all raise what the lowest of those that failed raised.

    Without it a rank whose scoring failed would leave the others waiting in the next collective. Of an error that is
    not ours, such as out of memory, the others hear in one of ours.
    """
    failure: Exception | StopRequested | None = None
    try:
        yield
    except (Exception, StopRequested) as error:
        failure = error
    try:
        told_by_all = ranks.gather(_told(failure))
    except RankLostError as lost:
        raise lost from failure
    for rank, told in enumerate(told_by_all):
        if told is not None:
            if rank == ranks.rank and failure is not None:
                raise failure
            raise _heard(rank, told) from failure


def _told(failure: Exception | StopRequested | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    if isinstance(failure, StopRequested):
        return {"signal": failure.number}
    known = known_error(failure)
    return {"code": known.code, "message": known.message, "retry_after_s": known.retry_after_s}


def known_error(failure: Exception) -> OpdError:
    """The failure, or what other ranks hear of one that is none of ours."""
    if isinstance(failure, OpdError):
        return failure
    if is_out_of_memory(failure):
        return ConfigError(f"out of memory ({first_line(failure)}); its own last line names the settings to lower")
    return InternalError(f"{type(failure).__name__}: {first_line(failure)}")


def _heard(rank: int, told: dict[str, Any]) -> OpdError | StopRequested:
    if "signal" in told:
        return StopRequested(told["signal"])
    return from_code(told["code"], f"rank {rank}: {told['message']}", told["retry_after_s"])
