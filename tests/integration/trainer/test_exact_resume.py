"""A run that is killed, again and again and wherever it is, and one that never was: the same numbers to the bit."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from opd.queue.embedded import EmbeddedRedis
from services.trainer.probe import PROBE_FILE
from services.trainer.run_log import read_steps
from tests.integration.trainer.test_training_processes import (
    PATIENCE_S,
    Processes,
    finish,
    models,
    num_steps,
    processes,
    redis,
    said,
    same_weights,
    wait_until,
)

__all__ = ["models", "processes", "redis"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = 14
SETTINGS = (f"steps={STEPS}", "deterministic=true", "checkpoint.every_steps=1", "metrics.coherence_every_steps=3")


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """Everything that metrics.jsonl says of each step but for times."""
    return [
        {name: value for name, value in record.items() if name != "time" and not name.startswith("timing/")}
        for record in read_steps(run_dir)
    ]


def is_writing(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".partial-*"))


def watch_for(moment: Callable[[], bool], trainer: "subprocess.Popen[str]") -> None:
    """Looks every few milliseconds: a checkpoint of this size is written in some tens of them."""
    deadline = time.monotonic() + PATIENCE_S
    while not moment():
        assert trainer.poll() is None, said(trainer)
        assert time.monotonic() < deadline, said(trainer)
        time.sleep(0.002)


def whole(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def test_killed_five_times_and_the_numbers_are_those_of_the_run_that_never_was(
    redis: EmbeddedRedis, processes: Processes, tmp_path: Path
) -> None:
    """While it measures its first probe, while it samples and trains, and while it writes a checkpoint."""
    processes.teacher(redis.url)
    run_dir, other = tmp_path / "run", tmp_path / "whole"
    moments: list[Callable[[], bool]] = [
        lambda: (run_dir / PROBE_FILE).exists(),
        lambda: num_steps(run_dir) >= 1,
        lambda: is_writing(run_dir),
        lambda: num_steps(run_dir) >= 5,
        lambda: is_writing(run_dir) and num_steps(run_dir) >= 6,
    ]
    for moment in moments:
        trainer = processes.trainer(redis.url, *SETTINGS, "--resume")
        watch_for(moment, trainer)
        trainer.kill()
        trainer.wait()
    last = processes.trainer(redis.url, *SETTINGS, "--resume")
    assert finish(last) == 0, said(last)
    never_killed = processes.trainer(redis.url, *SETTINGS, f"run_dir={other}")
    assert finish(never_killed) == 0, said(never_killed)
    found, expected = numbers(run_dir), numbers(other)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert found == expected and "distill/gradient_coherence" in found[2]
    assert same_weights(run_dir / f"checkpoints/step-{STEPS:06d}", other / f"checkpoints/step-{STEPS:06d}")
    assert whole(run_dir) == whole(other) and not is_writing(run_dir)
    check_nothing_waits(redis.url)


def check_nothing_waits(url: str) -> None:
    """What the dead runs had sent is neither scored for nobody nor kept: bodies expire, requests are let go."""
    deadline = time.monotonic() + 60
    with Redis.from_url(url) as connection:
        while bodies := connection.keys("*:body:*"):
            assert time.monotonic() < deadline, bodies
            time.sleep(0.2)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    redis: EmbeddedRedis, processes: Processes, tmp_path: Path
) -> None:
    processes.teacher(redis.url)
    run_dir, other = tmp_path / "run", tmp_path / "whole"
    trainer = processes.trainer(redis.url, *SETTINGS)
    wait_until(lambda: len(whole(run_dir)) >= 2, trainer)
    trainer.kill()
    trainer.wait()
    *_, before, newest = whole(run_dir)
    weights = run_dir / "checkpoints" / newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    resumed = processes.trainer(redis.url, *SETTINGS, "--resume")
    assert finish(resumed) == 0, said(resumed)
    assert f"{newest}/model.safetensors: is not what was written" in said(resumed)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [int(before.removeprefix("step-"))]
    never_killed = processes.trainer(redis.url, *SETTINGS, f"run_dir={other}")
    assert finish(never_killed) == 0, said(never_killed)
    assert numbers(run_dir) == numbers(other)
