"""The services on loopback as an operator would run them: a Redis, two bundled teachers, the pool status process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from opd.lifecycle import DIE_WITH_PARENT
from opd.queue.embedded import EmbeddedRedis
from testbed.stack import DATA, MODELS

ROOT = Path(__file__).parents[3]
START_S = 120.0
TEACHERS = {"post": "teacher-post", "big": "teacher-big"}
NUM_PROMPTS = 64


def wait_until(condition: Callable[[], Any], timeout_s: float = START_S, said: Callable[[], str] = str) -> Any:
    """What `condition` returns once it is true."""
    give_up_at = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < give_up_at, said()
        time.sleep(0.1)
    return found


@dataclass
class Service:
    """A process and its log; its standard output goes there too."""

    process: subprocess.Popen[bytes]
    log_path: Path
    note: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first place of its log that matches."""

        def look() -> re.Match[str] | None:
            found = re.search(pattern, self.log)
            assert found or self.process.poll() is None, self.log
            return found

        found: re.Match[str] = wait_until(look, said=lambda: self.log)
        return found

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


class Services:
    """Starts processes and ends exactly these."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Service] = []

    def start(self, name: str, *command: str, environ: dict[str, str] | None = None) -> Service:
        """Runs `command`, Python's where it begins with an option."""
        path = self.folder / f"{len(self.started)}-{name}.log"
        environment = {**os.environ, DIE_WITH_PARENT: str(os.getpid()), "HF_HUB_OFFLINE": "1"} | (environ or {})
        environment.pop("OPD_REDIS_URL", None)
        command = (sys.executable, *command) if command[0].startswith("-") else command
        with path.open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.started.append(Service(process, path))
        return self.started[-1]

    def teacher(self, name: str, *overrides: str, environ: dict[str, str] | None = None) -> Service:
        """Returns once it takes requests; `note` holds its ports."""
        ready = self.folder / f"{len(self.started)}-ready.json"
        settings = (f"model={MODELS / TEACHERS[name]}", f"teacher={name}", "device=cpu", "torch_threads=1")
        service = self.start(
            name, "-m", "services.teacher_server", *settings, *overrides, "--ready-file", str(ready), environ=environ
        )

        def is_ready() -> bool:
            assert service.process.poll() is None, service.log
            return ready.is_file()

        wait_until(is_ready, said=lambda: service.log)
        service.note = json.loads(ready.read_text(encoding="utf-8"))
        return service

    def pool(self, redis_url: str, *teachers: str) -> tuple[Service, int]:
        """The pool status process and its port."""
        names = json.dumps(list(teachers))
        service = self.start("pool", "-m", "services.cli", "pool", "serve", f"teachers={names}",
                             f"redis_url={redis_url}", "port=0", "cache_s=0.2")  # fmt: skip
        return service, int(service.wait_for(r"on http://127\.0\.0\.1:(\d+)")[1])

    def trainer(self, *overrides: str, environ: dict[str, str] | None = None) -> Service:
        """A run of the bundled student with small steps."""
        run_dir = self.folder / f"run-{len(self.started)}"
        service = self.start(
            "trainer", "-m", "services.trainer", f"student.model={MODELS / 'student-base'}", f"run_dir={run_dir}",
            "student.device=cpu", "student.max_micro_batch_tokens=4096", "rollout.prompts_per_step=8",
            "rollout.rollouts_per_prompt=2", "rollout.max_prompt_tokens=256", "rollout.max_response_tokens=96",
            "objective.score_top_k=8", "optim.lr=1e-4", "metrics.coherence_every_steps=1",
            "metrics.coherence_rollouts=8", *overrides, environ=environ,
        )  # fmt: skip
        service.note = {"run_dir": run_dir}
        return service

    def close(self) -> None:
        for service in reversed(self.started):
            if service.process.poll() is None:
                service.process.kill()
            service.process.wait(10)


@dataclass(frozen=True)
class Installation:
    """What runs, and where."""

    services: Services
    redis_url: str
    teachers: dict[str, Service]
    pool: Service
    pool_port: int
    prompts: Path

    def port(self, teacher: str) -> int:
        return int(self.teachers[teacher].note["http_port"])


def scrape(port: int) -> str:
    """`/metrics` of a process on loopback."""
    response = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=10)
    response.raise_for_status()
    return response.text


def write_prompts(path: Path) -> Path:
    """Bundled problems, each with the teacher that is to score it in the column `who`."""
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_PROMPTS]
    rows = [json.loads(line) | {"who": list(TEACHERS)[index % 2]} for index, line in enumerate(lines)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    """For a test that starts what it needs."""
    found = Services(tmp_path)
    yield found
    found.close()


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("installation")
    services = Services(folder)
    with EmbeddedRedis(folder / "redis", options=("maxmemory 512mb",)) as server:
        try:
            settings = (f"redis_url={server.url}", "queue.announce_s=0.5")
            teachers = {name: services.teacher(name, *settings) for name in TEACHERS}
            pool, port = services.pool(server.url, *TEACHERS)
            yield Installation(services, server.url, teachers, pool, port, write_prompts(folder / "prompts.jsonl"))
        finally:
            services.close()
