"""One trainer and several teachers, or two versions of one, as real processes on one Redis."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis import Redis

from opd.client import SyncScoreClient
from opd.queue.embedded import EmbeddedRedis
from opd.types import ScoreRequest, Scores
from services.trainer.run_log import read_steps
from tests.integration.trainer.test_training_processes import (
    Processes,
    check_complete,
    finish,
    models,
    num_steps,
    processes,
    redis,
    said,
    wait_until,
)
from tests.unit.trainer.tiny_training import exact_scores, tiny_model, tiny_tokenizer

__all__ = ["models", "processes", "redis"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SEEDS = {"math": 3, "code": 4}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two different teachers by name, and `prompts.jsonl` whose rows take turns between them."""
    found = {name: tmp_path / name for name in SEEDS}
    for name, folder in found.items():
        tiny_model(SEEDS[name]).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    rows = [{"prompt": f"w{2 + i % 20} w{3 + i % 7}", "who": ("math", "code")[i % 2]} for i in range(64)]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return found


def start_teacher(processes: Processes, url: str, folder: Path, name: str, *overrides: str) -> "subprocess.Popen[str]":
    ready = folder.parent / f"ready-{folder.name}-{len(processes._started)}.json"
    process = processes._start(
        "services.teacher_server", f"model={folder}", f"teacher={name}", f"redis_url={url}", "device=cpu",
        "queue.lease_s=1.0", "queue.announce_s=0.5", *overrides, "--ready-file", str(ready),
    )  # fmt: skip
    wait_until(ready.is_file, process)
    process.note = json.loads(ready.read_text(encoding="utf-8"))  # type: ignore[attr-defined]
    return process


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def ask(url: str, name: str) -> tuple[ScoreRequest, Scores]:
    request = ScoreRequest(
        rollout_id=f"direct.0.{name}", tenant="default", teacher=name,
        prompt_token_ids=np.array([5, 6], np.int32), response_token_ids=np.array([7, 8, 1], np.int32),
        candidate_token_ids=np.array([[7, 3], [8, 2], [1, 9]], np.int32), score_top_k=4, wants_entropy=True,
    )  # fmt: skip
    with SyncScoreClient.connect(url, teacher=name, tenant="default") as client:
        return request, client.submit(request).result(60).scores


def test_each_prompt_has_its_own_teacher_and_one_killed_loses_nothing(
    redis: EmbeddedRedis, processes: Processes, folders: dict[str, Path], tmp_path: Path
) -> None:
    teachers = {name: start_teacher(processes, redis.url, folder, name) for name, folder in folders.items()}
    for name, seed in SEEDS.items():
        request, scores = ask(redis.url, name)
        expected = exact_scores(tiny_model(seed), request)
        np.testing.assert_allclose(scores.candidate_logprobs, expected.candidate_logprobs, atol=1e-4)
    run_dir = tmp_path / "run"
    trainer = processes.trainer(
        redis.url, "steps=12", f'data.files=["{tmp_path / "prompts.jsonl"}"]', "data.teacher_column=who",
        "teachers.math.tenant=a", "teachers.code.tenant=b",
    )  # fmt: skip
    wait_until(lambda: num_steps(run_dir) >= 3, trainer)
    teachers["code"].kill()
    teachers["code"].wait()
    start_teacher(processes, redis.url, folders["code"], "code")
    assert finish(trainer) == 0, said(trainer)
    check_complete(run_dir, 12)
    (event,) = events(run_dir, "teachers")
    assert event["fingerprints"] == {name: teachers[name].note["fingerprint"] for name in SEEDS}  # type: ignore[attr-defined]
    for record in read_steps(run_dir):
        counts = {name: record[f"queue/rollouts_scored/teacher/{name}"] for name in SEEDS}
        assert sum(counts.values()) == 8
        for name in SEEDS:
            assert (f"loss/reverse_kl/teacher/{name}" in record) == (counts[name] > 0)


def test_a_promoted_pool_is_taken_up_at_the_next_step(
    redis: EmbeddedRedis, processes: Processes, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Both versions run; each step is of one fingerprint, and the accepting side refuses any other."""
    marks = []
    for folder in folders.values():
        teacher = start_teacher(processes, redis.url, folder, "teacher", "queue.per_fingerprint=true")
        marks.append(teacher.note["fingerprint"])  # type: ignore[attr-defined]
    old, new = marks
    promote(redis.url, f"teacher@{old}")
    run_dir = tmp_path / "run"
    trainer = processes.trainer(redis.url, "steps=24")
    wait_until(lambda: num_steps(run_dir) >= 3, trainer)
    promote(redis.url, f"teacher@{new}")
    assert finish(trainer) == 0, said(trainer)
    check_complete(run_dir, 24)
    first, second = events(run_dir, "teachers")
    assert (first["fingerprints"], second["fingerprints"]) == ({"": old}, {"": new})
    moved_at = second["step"]
    assert (first["step"], moved_at > 3) == (1, True)
    # What each pool was asked is what the steps before and after the move sent: none went to the other.
    assert completed(redis.url, f"teacher@{old}") == 8 * (moved_at - 1)
    assert completed(redis.url, f"teacher@{new}") == 8 * (24 - moved_at + 1)


def promote(url: str, pool: str) -> None:
    import sys

    command = [sys.executable, "-m", "services.cli", "pool", "promote", "teacher", pool, "--redis-url", url]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert f"teacher is now served by {pool}" in found.stdout


def completed(url: str, pool: str) -> int:
    from opd.queue.keys import PoolKeys

    with Redis.from_url(url) as connection:
        return int(connection.hget(PoolKeys(pool).counters, "completed") or 0)  # type: ignore[arg-type]
