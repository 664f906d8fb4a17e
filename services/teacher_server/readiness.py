"""Whether this replica should get work, and if not, why: one answer for readyz, gRPC health and the queue intake.

Parts of the process put a reason under their own name and take it away again; the replica is ready when no reason is
left. Used from the event loop only.
"""

import asyncio
from collections.abc import Callable
from enum import StrEnum


class Part(StrEnum):
    """Who may hold the replica back."""

    START = "start"
    CANARY = "canary"
    ENGINE = "engine"
    QUEUE = "queue"
    SHUTDOWN = "shutdown"


# A lost Redis says nothing about answering a direct caller; all else does.
_STOPS_SCORING = (Part.START, Part.CANARY, Part.ENGINE, Part.SHUTDOWN)


class Readiness:
    """Reasons by part, and those who want to know when the answer changes."""

    def __init__(self) -> None:
        self._reasons: dict[Part, str] = {Part.START: "the model is being loaded"}
        self._listeners: list[Callable[[bool], None]] = []
        self._can_score = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        return not self._reasons

    @property
    def reasons(self) -> dict[Part, str]:
        return dict(self._reasons)

    def why_not_scoring(self) -> str:
        """Empty when requests can be scored."""
        return "; ".join(self._reasons[part] for part in _STOPS_SCORING if part in self._reasons)

    def describe(self) -> str:
        """One line for people."""
        return "; ".join(f"{part}: {reason}" for part, reason in self._reasons.items()) or "ready"

    async def wait_until_scoring(self) -> None:
        """Returns when nothing but the queue itself holds the replica back."""
        await self._can_score.wait()

    def subscribe(self, listener: Callable[[bool], None]) -> None:
        """Calls `listener` now and at every change of `is_ready`."""
        self._listeners.append(listener)
        listener(self.is_ready)

    def hold(self, part: Part, reason: str) -> None:
        """The replica is not ready while this stands."""
        self._change({**self._reasons, part: reason})

    def clear(self, part: Part) -> None:
        """Takes the part's reason away."""
        self._change({found: reason for found, reason in self._reasons.items() if found is not part})

    def _change(self, reasons: dict[Part, str]) -> None:
        was_ready, self._reasons = self.is_ready, reasons
        if self.why_not_scoring():
            self._can_score.clear()
        else:
            self._can_score.set()
        if self.is_ready != was_ready:
            for listener in self._listeners:
                listener(self.is_ready)
