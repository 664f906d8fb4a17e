"""The seam between the service and the model: what every scoring engine does, and what it reports of a forward pass.

An engine is synchronous and is called from one thread only. It gets requests that were validated against its own
`info()`, and answers each of them by itself: a fault in one request's rows is that request's answer and nobody else's.
An engine that cannot supply a field exactly leaves the capability out of `info()`; it never approximates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from opd.errors import OpdError
from opd.types import ScoreRequest, Scores, SharedHead, TeacherInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardReport:
    """One forward pass, told to whoever watches the engine (metrics, the stall clock).

    Example: three rollouts of 10, 9 and 8 tokens in one rectangle of 3 x 10::

        ForwardReport(num_requests=3, num_tokens=27, num_padded_tokens=30, duration_s=0.02)
    """

    num_requests: int
    num_tokens: int
    num_padded_tokens: int
    """Tokens computed, padding included."""
    duration_s: float
    num_reused_tokens: int = 0
    """Prompt tokens that were not computed because they had been before."""


ForwardObserver: TypeAlias = Callable[[ForwardReport], None]


class ScoringEngine(Protocol):
    """A loaded teacher."""

    def info(self) -> TeacherInfo:
        """The handshake: identity, vocabulary, limits and capabilities."""
        ...

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores | OpdError]:
        """One outcome per request, in order; blocks until all are computed.

        An exception means that the batch as a whole failed and says nothing about any single request.
        """
        ...

    def output_head(self) -> SharedHead:
        """The head; asked for only where the capability hidden_states is in `info()`, from any thread."""
        ...

    def forget(self) -> None:
        """Lets go of whatever is kept from earlier passes: it may have been computed while the engine was unsound."""
        ...

    def close(self) -> None:
        """Frees the model; the engine is not used afterwards."""
        ...
