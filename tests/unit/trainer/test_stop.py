"""Signals end a run where nothing can be torn."""

import os
import signal
import subprocess
import sys
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
        "import os, signal\nfrom services.trainer.stop import StopSignal\n"
        "with StopSignal():\n    os.kill(os.getpid(), 15)\n    os.kill(os.getpid(), 15)\n    raise SystemExit(0)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, check=False).returncode == 143
