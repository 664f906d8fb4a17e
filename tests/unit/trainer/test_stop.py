"""Signals end a run where nothing can be torn."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.trainer.stop import StopRequested, StopSignal

ROOT = Path(__file__).parents[3]


def test_a_signal_ends_an_interruptible_stretch_at_once() -> None:
    with StopSignal() as stop, pytest.raises(StopRequested) as caught, stop.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert (caught.value.signal_name, caught.value.exit_code) == ("SIGTERM", 143)


def test_elsewhere_it_waits_for_the_next_such_stretch() -> None:
    reached = []
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after the signal")
        with pytest.raises(StopRequested) as caught, stop.interruptible():
            reached.append("never")
        with pytest.raises(StopRequested):
            stop.check()
    assert reached == ["after the signal"]
    assert caught.value.exit_code == 130


def test_stretches_may_lie_inside_each_other() -> None:
    with StopSignal() as stop, pytest.raises(StopRequested), stop.interruptible():
        with stop.interruptible():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()


def test_it_is_no_error_that_a_handler_of_errors_would_catch() -> None:
    assert not issubclass(StopRequested, Exception)


def test_the_handlers_before_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_signal_ends_the_process() -> None:
    code = (
        "import os, time\nfrom opd.lifecycle import SAME_REQUEST_S\nfrom services.trainer.stop import StopSignal\n"
        "with StopSignal():\n    os.kill(os.getpid(), 15)\n    time.sleep(SAME_REQUEST_S + 0.1)\n"
        "    os.kill(os.getpid(), 15)\n    raise SystemExit(0)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, check=False).returncode == 143


LAUNCHER = """
import os, subprocess, sys, threading, time
from opd.lifecycle import DIE_WITH_PARENT
for _ in range(4):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
environment = {**os.environ, DIE_WITH_PARENT: str(os.getpid())}
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], env=environment).wait()
"""
TRAINER = """
import sys, time
from pathlib import Path
from opd.lifecycle import die_with_parent
from services.trainer.stop import StopRequested, StopSignal
with StopSignal() as stop:
    die_with_parent()
    Path(sys.argv[1]).write_text("up")
    try:
        with stop.interruptible():
            time.sleep(60)
    except StopRequested:
        time.sleep(0.3)
        Path(sys.argv[1]).write_text("saved")
"""


def test_a_launcher_of_many_threads_that_is_killed_leaves_time_to_save(tmp_path: Path) -> None:
    """The kernel tells of its death once for each of its threads."""
    place, deadline = tmp_path / "state", time.monotonic() + 30
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, TRAINER, str(place)], cwd=ROOT) as launcher:
        while not (place.is_file() and place.read_text() == "up"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        launcher.kill()
    deadline = time.monotonic() + 5
    while place.read_text() != "saved":
        assert time.monotonic() < deadline, "it ended before it had saved"
        time.sleep(0.02)
