"""Real teacher processes: started with dotted overrides, awaited by their ready file, ended by process id."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.unit.teacher_server.tiny_teachers import save_tiny_teacher

ROOT = Path(__file__).parents[3]
START_S = 90.0


class TeacherProcess:
    """One child process and what it said."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        folder.mkdir(parents=True)
        self.ready_file, self._log = folder / "ready.json", folder / "log.txt"
        command = [sys.executable, "-m", "services.teacher_server", *overrides, "--ready-file", str(self.ready_file)]
        environment = {**os.environ, "OPD_DIE_WITH_PARENT": str(os.getpid()), "OMP_NUM_THREADS": "1"}
        environment.pop("OPD_REDIS_URL", None)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_ready(self) -> dict[str, Any]:
        self.wait_for(self.ready_file.exists)
        return dict(json.loads(self.ready_file.read_text()))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + START_S
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < give_up_at, self.log
            time.sleep(0.05)

    def get(self, path: str, port: int | None = None) -> httpx.Response:
        port = port or int(self.wait_ready()["http_port"])
        return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=10)

    def end(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout_s)


StartTeacher = Callable[..., TeacherProcess]


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def start_teacher(tmp_path: Path, teacher_folder: Path) -> Iterator[StartTeacher]:
    """`start_teacher("queue.lease_s=1")`; a later `model=` or `teacher=` wins over the defaults."""
    started: list[TeacherProcess] = []

    def start(*overrides: str) -> TeacherProcess:
        defaults = [f"model={teacher_folder}", "teacher=tiny", "torch_threads=1"]
        started.append(TeacherProcess(tmp_path / f"teacher{len(started)}", *defaults, *overrides))
        return started[-1]

    yield start
    for teacher in started:
        if teacher.process.poll() is None:
            teacher.process.kill()
        teacher.process.wait(10)
