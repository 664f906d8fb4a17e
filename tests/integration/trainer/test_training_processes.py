"""A real trainer against a real teacher through a real Redis, each a process of its own, and each of them killed."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from redis import Redis
from safetensors.torch import load_file

from opd.queue.embedded import EmbeddedRedis
from services.trainer.run import FAILED, REFUSED
from services.trainer.run_log import read_steps
from tests.unit.trainer.tiny_training import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
PATIENCE_S = 300.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student/` and `teacher/`, random and different, and `prompts.jsonl`."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny_model(seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rows = [
        {"prompt": [{"role": "user", "content": f"w{2 + i % 20} w{3 + i % 7}"}], "data_source": "tiny"}
        for i in range(64)
    ]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder


class Processes:
    """Starts services and ends exactly these."""

    def __init__(self, folder: Path, models: Path) -> None:
        self._folder = folder
        self._models = models
        self._started: list[subprocess.Popen[str]] = []

    def teacher(self, redis_url: str) -> subprocess.Popen[str]:
        """Returns once it takes requests."""
        ready = self._folder / f"ready-{len(self._started)}.json"
        process = self._start(
            "services.teacher_server",
            f"model={self._models / 'teacher'}",
            f"redis_url={redis_url}",
            "device=cpu",
            "queue.lease_s=1.0",
            "queue.announce_s=0.5",
            "--ready-file",
            str(ready),
        )
        wait_until(ready.is_file, process)
        return process

    def trainer(self, redis_url: str, *overrides: str) -> subprocess.Popen[str]:
        return self._start(
            "services.trainer",
            f"student.model={self._models / 'student'}",
            f'data.files=["{self._models / "prompts.jsonl"}"]',
            "data.num_epochs=100",
            f"teacher.url={redis_url}",
            "teacher.timeout_s=300",
            f"run_dir={self._folder / 'run'}",
            "student.device=cpu",
            "student.max_micro_batch_tokens=64",
            "rollout.prompts_per_step=4",
            "rollout.rollouts_per_prompt=2",
            "rollout.max_prompt_tokens=20",
            "rollout.max_response_tokens=16",
            "objective.score_top_k=6",
            "optim.lr=1e-2",
            "checkpoint.every_steps=3",
            *overrides,
        )

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        errors = (self._folder / f"stderr-{len(self._started)}.log").open("w")
        with errors:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], cwd=ROOT, env=ENVIRONMENT, stderr=errors, text=True
            )
        process.log = Path(errors.name)  # type: ignore[attr-defined]
        self._started.append(process)
        return process


@pytest.fixture
def processes(tmp_path: Path, models: Path) -> Iterator[Processes]:
    started = Processes(tmp_path, models)
    yield started
    started.close()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        yield server


def said(process: subprocess.Popen[str]) -> str:
    log: Path = process.log  # type: ignore[attr-defined]
    return log.read_text(encoding="utf-8")


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        for process in processes:
            assert process.poll() is None, said(process)
        assert time.monotonic() < deadline, [said(process) for process in processes]
        time.sleep(0.05)


def num_steps(run_dir: Path) -> int:
    return len(read_steps(run_dir))


def finish(process: subprocess.Popen[str]) -> int:
    return process.wait(timeout=PATIENCE_S)


def summary(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "train_summary.json").read_text(encoding="utf-8"))
    return found


def check_complete(run_dir: Path, steps: int) -> None:
    """Every step once, every rollout scored once, nothing lost."""
    assert [record["step"] for record in read_steps(run_dir)] == list(range(1, steps + 1))
    found = summary(run_dir)
    assert (found["state"], found["steps"]) == ("finished", steps)
    assert (found["rollouts_sent"], found["rollouts_scored"], found["rollouts_lost"]) == (8 * steps, 8 * steps, 0)


def test_a_teacher_killed_in_mid_run_loses_nothing(redis_url: str, processes: Processes, tmp_path: Path) -> None:
    """On both generations of Redis: kill -9 of the only replica, another one takes over, the status tells."""
    first = processes.teacher(redis_url)
    trainer = processes.trainer(redis_url, "steps=14")
    run_dir = tmp_path / "run"
    wait_until(lambda: num_steps(run_dir) >= 3, trainer)
    first.kill()
    first.wait()
    port = said(trainer).partition("status on http://127.0.0.1:")[2].partition("/")[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/run", timeout=5) as response:
        status = json.load(response)
    assert status["num_steps"] == 14 and 3 <= status["step"] < 14
    processes.teacher(redis_url)
    assert finish(trainer) == 0, said(trainer)
    check_complete(run_dir, 14)
    found = summary(run_dir)
    assert found["reverse_kl_last"] < found["reverse_kl_first"]
    weights = load_file(run_dir / "checkpoints/step-000014/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def restart(server: EmbeddedRedis) -> None:
    server.kill()
    time.sleep(1.0)
    server.start()


def test_a_redis_killed_in_mid_run_is_waited_for(redis: EmbeddedRedis, processes: Processes, tmp_path: Path) -> None:
    processes.teacher(redis.url)
    trainer = processes.trainer(redis.url, "steps=10")
    run_dir = tmp_path / "run"
    wait_until(lambda: num_steps(run_dir) >= 3, trainer)
    restart(redis)
    assert finish(trainer) == 0, said(trainer)
    check_complete(run_dir, 10)


def test_a_redis_that_stays_away_ends_the_run_in_one_line(
    redis: EmbeddedRedis, processes: Processes, tmp_path: Path
) -> None:
    """Within the patience, with the last completed step on disk; the run then goes on where it was."""
    processes.teacher(redis.url)
    trainer = processes.trainer(redis.url, "steps=8", "teacher.patience_s=2", "checkpoint.every_steps=0")
    run_dir = tmp_path / "run"
    wait_until(lambda: num_steps(run_dir) >= 2, trainer)
    redis.kill()
    assert finish(trainer) == 1, said(trainer)
    last = said(trainer).splitlines()[-1]
    assert last.startswith("opd train: step ") and "not reachable for 2 s" in last
    assert "Traceback" not in said(trainer)
    done = num_steps(run_dir)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    redis.start()
    processes.teacher(redis.url)
    resumed = processes.trainer(redis.url, "steps=8", "--resume")
    assert finish(resumed) == 0, said(resumed)
    check_complete(run_dir, 8)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_leaves_a_checkpoint_and_goes_on_exactly(
    redis: EmbeddedRedis, processes: Processes, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    processes.teacher(redis.url)
    run_dir = tmp_path / "run"
    overrides = ("steps=7", "deterministic=true", "checkpoint.every_steps=0")
    stopped = processes.trainer(redis.url, *overrides)
    wait_until(lambda: num_steps(run_dir) >= 3, stopped)
    stopped.send_signal(number)
    assert finish(stopped) == code, said(stopped)
    done = num_steps(run_dir)
    assert 3 <= done < 7
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    assert summary(run_dir)["state"] == "stopped"
    assert "go on with --resume" in said(stopped)

    again = processes.trainer(redis.url, *overrides)
    assert finish(again) == 2
    assert "holds a run already; use --resume" in said(again).splitlines()[-1]

    resumed = processes.trainer(redis.url, *overrides, "--resume")
    assert finish(resumed) == 0, said(resumed)
    check_complete(run_dir, 7)
    whole = processes.trainer(redis.url, *overrides, f"run_dir={tmp_path / 'whole'}")
    assert finish(whole) == 0, said(whole)
    assert losses(run_dir) == losses(tmp_path / "whole")
    assert same_weights(run_dir / "checkpoints/step-000007", tmp_path / "whole/checkpoints/step-000007")


def losses(run_dir: Path) -> list[float]:
    return [record["loss/objective"] for record in read_steps(run_dir)]


def same_weights(first: Path, second: Path) -> bool:
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    return all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def refused(trainer: subprocess.Popen[str], code: int) -> str:
    """The one line of a run that did not start."""
    assert finish(trainer) == code, said(trainer)
    assert "Traceback" not in said(trainer)
    lines: Sequence[str] = said(trainer).splitlines()
    return lines[-1]


def test_a_queue_that_is_not_there_is_one_line(processes: Processes, tmp_path: Path) -> None:
    line = refused(processes.trainer(f"unix://{tmp_path}/nobody.sock", "steps=1"), FAILED)
    assert line.startswith("opd train: redis unix://") and "not reachable" in line
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_queue_that_evicts_is_one_line(redis: EmbeddedRedis, processes: Processes) -> None:
    with Redis.from_url(redis.url) as connection:
        connection.config_set("maxmemory-policy", "allkeys-lru")
    line = refused(processes.trainer(redis.url, "steps=1"), REFUSED)
    assert line.startswith("opd train: redis unix://") and "maxmemory-policy=allkeys-lru could evict requests" in line


def test_a_pool_without_a_replica_is_waited_for_and_then_one_line(redis: EmbeddedRedis, processes: Processes) -> None:
    line = refused(processes.trainer(redis.url, "steps=1", "teacher.wait_s=1"), FAILED)
    assert line.startswith("opd train: teacher pool teacher: no replica within 1 s")
