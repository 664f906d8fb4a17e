"""How a run is asked to end: SIGTERM and SIGINT, heard only where nothing can be torn.

While rollouts are sampled, scored and added to the gradient, a signal ends the step at once; the weights are those of
the last completed step. During an optimizer step or a checkpoint it is only noted, and acted upon at the next such
place. A second signal, unless it comes right with the first, ends the process at once.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from opd.lifecycle import SAME_REQUEST_S

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_EXIT_BASE = 128


class StopRequested(BaseException):
    """Not an error, so nothing that handles errors catches it."""

    def __init__(self, number: int) -> None:
        self.signal_name = signal.Signals(number).name
        self.exit_code = _EXIT_BASE + number
        super().__init__(self.signal_name)


class StopSignal:
    """The one owner of SIGTERM and SIGINT while it is entered; only in the main thread."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._requested_at_s = 0.0
        self._is_interruptible = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises `StopRequested` if a signal has come."""
        if self._number is not None:
            raise StopRequested(self._number)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within, a signal raises `StopRequested` at once."""
        before, self._is_interruptible = self._is_interruptible, True
        try:
            self.check()
            yield
        finally:
            self._is_interruptible = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None:
            if time.monotonic() - self._requested_at_s > SAME_REQUEST_S:
                os._exit(_EXIT_BASE + number)
            return
        self._number, self._requested_at_s = number, time.monotonic()
        if self._is_interruptible:
            raise StopRequested(number)
