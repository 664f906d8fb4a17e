"""The launcher of the demo leaves nothing behind: on Ctrl-C, SIGTERM, a dead child, its own sudden death."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PATIENCE_S = 300.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Demo:
    """One launcher and the processes that work for its run folder."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "demo"
        self._log = folder / "log.txt"
        environment = {name: value for name, value in os.environ.items() if name != "OPD_REDIS_URL"}
        command = [sys.executable, "-m", "services.cli", "demo", "--steps", "500", "--run-dir", str(self.run_dir)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def workers(self) -> dict[str, int]:
        """Redis, teacher and trainer by name: processes that name the run folder or live in it."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:
                continue
            if str(self.run_dir) in command and int(folder.name) != self.process.pid:
                names = ("teacher_server", "services.trainer", "redis")
                found[next((name for name in names if name in command), command)] = int(folder.name)
        return found

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.said
            time.sleep(0.1)

    def wait_for_training(self) -> None:
        """Until every process is at work and one step is done."""
        metrics = self.run_dir / "metrics.jsonl"

        def is_training() -> bool:
            assert self.process.poll() is None, self.said
            return metrics.is_file() and metrics.stat().st_size > 0

        self.wait_until(is_training)
        assert set(self.workers()) == {"redis", "teacher_server", "services.trainer"}

    def close(self) -> None:
        for number in (*self.workers().values(), self.process.pid):
            if self.process.poll() is None or number != self.process.pid:
                os.kill(number, signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    started = Demo(tmp_path)
    yield started
    started.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_and_keeps_the_run(demo: Demo, number: signal.Signals) -> None:
    demo.wait_for_training()
    demo.process.send_signal(number)
    assert demo.process.wait(PATIENCE_S) == 130
    assert demo.workers() == {}
    assert "everything that was started has ended" in demo.said and "Traceback" not in demo.said
    assert list((demo.run_dir / "checkpoints").glob("step-*"))
    assert json.loads((demo.run_dir / "train_summary.json").read_text(encoding="utf-8"))["state"] == "stopped"


def test_a_child_that_dies_ends_everything_in_one_line(demo: Demo) -> None:
    demo.wait_for_training()
    os.kill(demo.workers()["services.trainer"], signal.SIGKILL)
    assert demo.process.wait(PATIENCE_S) == 1
    assert demo.workers() == {}
    assert "opd: the trainer ended with code -9" in demo.said.splitlines()[-1]
    assert "Traceback" not in demo.said


def test_a_killed_launcher_takes_its_children_along(demo: Demo) -> None:
    demo.wait_for_training()
    demo.process.kill()
    demo.process.wait(10)
    demo.wait_until(lambda: not demo.workers())
