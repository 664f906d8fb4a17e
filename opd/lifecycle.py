"""How a process ends: one owner of signals, and no child that outlives its parent.

`Shutdown` turns SIGTERM and SIGINT into one event, and a second signal into an immediate end. `die_with_parent` asks
the kernel to end this process when the one that started it is gone, however that happened.
"""

import asyncio
import ctypes
import logging
import os
import signal
import sys
import time

_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1
DIE_WITH_PARENT = "OPD_DIE_WITH_PARENT"
"""Environment variable: the process id of the launcher to die with."""
SAME_REQUEST_S = 1.0
"""Signals closer together than this are one request to end: the kernel tells of a launcher that was killed once for
each of its threads, and who loses patience takes longer."""


class Shutdown:
    """The one owner of SIGTERM and SIGINT in an asyncio process."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.signal_name = ""
        self._requested_at_s = 0.0

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        """Takes both signals over; other owners, such as uvicorn's, must be off."""
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._handle, number)

    def request(self, reason: str) -> None:
        """Asks for the same orderly end from inside."""
        if not self.requested.is_set():
            self.signal_name, self._requested_at_s = reason, time.monotonic()
        self.requested.set()

    def _handle(self, number: signal.Signals) -> None:
        if self.requested.is_set() and time.monotonic() - self._requested_at_s > SAME_REQUEST_S:
            _log.warning("%s again, ending at once", signal.Signals(number).name)
            os._exit(130)
        self.request(signal.Signals(number).name)


def die_with_parent() -> None:
    """Ends this process with SIGTERM when its launcher is gone, where `OPD_DIE_WITH_PARENT` names the launcher."""
    launcher = os.environ.get(DIE_WITH_PARENT, "")
    if not launcher.isdigit() or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # The launcher may have gone between our start and the call above.
    if os.getppid() != int(launcher):
        sys.exit("the launcher is gone")
