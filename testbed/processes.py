"""Child processes of a launcher: started in order, watched, and stopped in reverse order whatever happens.

Every child has a session of its own, so that Ctrl-C reaches the launcher alone and it decides the order of stopping;
and every child dies with the launcher, even when that is killed outright.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from opd.errors import InternalError
from opd.lifecycle import DIE_WITH_PARENT

_log = logging.getLogger(__name__)
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.05
# Trainer and teacher work at the same time, and threads of two processes that wait for each other on the same few cores
# cost many times what they gain: measured on two busy cores, sampling took 4.3 s with one thread and 106 s with two.
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Terminated(Exception):
    """SIGTERM reached the launcher; raised so that every context is left in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """One process of ours and where it writes."""

    name: str
    process: "subprocess.Popen[bytes]"
    log_path: Path

    def last_line(self) -> str:
        """What it said last: the reason when it ended by itself."""
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


@dataclass(kw_only=True, slots=True)
class Processes:
    """The launcher's children; leaving the context stops them all."""

    log_dir: Path
    children: list[Child] = field(default_factory=list)

    def __enter__(self) -> "Processes":
        self.log_dir.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in reversed(self.children):
            stop(child)

    def start(self, name: str, arguments: Sequence[str], *, shows_progress: bool = False) -> Child:
        """Runs `python <arguments>`; its output goes to `<log_dir>/<name>.log`, or to ours when it shows progress."""
        log_path = self.log_dir / f"{name}.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=None if shows_progress else log,
                stderr=None if shows_progress else subprocess.STDOUT,
                env={**_ONE_THREAD, **os.environ, DIE_WITH_PARENT: str(os.getpid())},
                start_new_session=True,
            )
        child = Child(name=name, process=process, log_path=log_path)
        self.children.append(child)
        return child

    def wait_until(self, child: Child, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Waits for `is_ready`; a child that ends first, or takes too long, is an InternalError with its last words."""
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            if child.process.poll() is not None:
                raise InternalError(f"{child.name} ended with code {child.process.returncode}: {child.last_line()}")
            if time.monotonic() > deadline:
                raise InternalError(f"{child.name} was not ready in {timeout_s:.0f} s; its log is {child.log_path}")
            time.sleep(_POLL_S)


def stop(child: Child) -> None:
    """SIGTERM, a bounded wait, then SIGKILL; safe to call twice."""
    if child.process.poll() is not None:
        return
    child.process.terminate()
    try:
        child.process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        _log.warning("%s did not end in %.0f s and is killed", child.name, _STOP_TIMEOUT_S)
        child.process.kill()
        child.process.wait()


@contextmanager
def terminable() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that it unwinds like Ctrl-C."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before: Callable[[int, FrameType | None], Any] | int | None = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
