"""`opd preflight` as a process, with a teacher in a pool beside the same teacher as a folder."""

import json
import signal
from pathlib import Path

import pytest

from opd.queue.embedded import EmbeddedRedis
from tests.integration.trainer.test_training_processes import (
    Processes,
    finish,
    models,
    processes,
    redis,
    said,
    wait_until,
)

__all__ = ["models", "processes", "redis"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def arguments(models: Path, output: Path, *teachers: str) -> list[str]:
    return [
        "preflight", "--student", str(models / "student"), "--teachers", *teachers,
        "--prompts", str(models / "prompts.jsonl"), "--num-prompts", "40", "--output", str(output),
        "--set", "max_response_tokens=16", "--set", "objective.score_top_k=6", "--set", "device=cpu",
        "--set", "templates=[]", "--set", "batch_rollouts=16",
    ]  # fmt: skip


def test_a_pool_is_judged_as_its_folder_is_and_an_interrupted_preflight_goes_on(
    redis: EmbeddedRedis, processes: Processes, models: Path, tmp_path: Path
) -> None:
    processes.teacher(redis.url)
    output = tmp_path / "preflight"
    told = arguments(models, output, str(models / "teacher"), f"{redis.url}#teacher")
    first = processes._start("services.cli", *told)
    wait_until(lambda: any(path.stat().st_size for path in output.glob("records-*.jsonl")), first)
    first.send_signal(signal.SIGINT)
    # On a machine that is fast enough it may have ended before the signal came.
    assert finish(first) in (0, 130), said(first)
    begun = next(output.glob("records-*.jsonl")).read_text(encoding="utf-8")
    second = processes._start("services.cli", *told)
    assert finish(second) == 0, said(second)
    assert next(output.glob("records-*.jsonl")).read_text(encoding="utf-8").startswith(begun[: begun.rfind("\n") + 1])
    folder, pool = json.loads((output / "preflight.json").read_text(encoding="utf-8"))["teachers"]
    assert (folder["name"], pool["name"]) == ("teacher", "teacher~2")
    for name, estimate in folder["metrics"].items():
        assert pool["metrics"][name]["value"] == pytest.approx(estimate["value"], abs=1e-4), name
    assert folder["metrics"]["reverse_kl"]["low"] > 0.1
    assert pool["accuracy"] is None
    assert pool["fingerprint"] not in ("", folder["fingerprint"])
