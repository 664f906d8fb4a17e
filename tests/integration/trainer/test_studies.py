"""`opd continuation` and `opd auroc` on the bundled models: local teachers, a real pool, and going on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opd.errors import ConfigError, VocabularyMismatchError
from services.trainer.evaluation.opening import Loading
from services.trainer.evaluation.reward import NO_EVIDENCE
from services.trainer.evaluation.studies import StudySettings, auroc_command, continuation_command
from services.trainer.rollout.base import SamplingParams
from tests.unit.trainer.tiny_training import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[3]
MODELS = ROOT / "testbed/models"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

pytestmark = pytest.mark.timeout(600)


def settings(folder: Path, **changes: Any) -> StudySettings:
    values: dict[str, Any] = {
        "student": str(MODELS / "student-base"),
        "data": str(ROOT / "testbed/data/heldout.jsonl"),
        "sampling": SamplingParams(temperature=1.0, max_response_tokens=160, seed=2),
        "num_samples": 3,
        "max_problems": 8,
        "loading": Loading(device="cpu"),
        "cache_folder": folder / "cache",
        "output": folder / "out" / "result.json",
        "figure": folder / "out" / "figure.png",
    }
    return StudySettings(**(values | changes))


def quiet(folder: Path) -> Console:
    return Console(file=(folder / "printed.txt").open("w", encoding="utf-8"), width=80)


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Console]:
    found = quiet(tmp_path)
    yield found
    found.file.close()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL#POOL of teacher-post, served by a process of its own."""
    folder = tmp_path_factory.mktemp("pool")
    ready = folder / "ready.json"
    command = [
        sys.executable, "-m", "services.teacher_server", f"model={MODELS / 'teacher-post'}", "teacher=post",
        "torch_threads=1", "device=cpu", "--ready-file", str(ready),
    ]  # fmt: skip
    environment = {**ENVIRONMENT, "OPD_DIE_WITH_PARENT": str(os.getpid())}
    environment.pop("OPD_REDIS_URL", None)
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 200
    while not ready.exists():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.1)
    yield f"grpc://127.0.0.1:{json.loads(ready.read_text())['grpc_port']}#post"
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def test_a_pool_says_what_the_folder_says(tmp_path: Path, console: Console, pool: str) -> None:
    teachers = [str(MODELS / "teacher-post"), str(MODELS / "teacher-big")]
    local = auroc_command(settings(tmp_path), teachers, console=console)
    assert [one["teacher"] for one in local["teachers"]] == ["teacher-post", "teacher-big"]
    assert len(local["is_correct"]) == local["num_rollouts"] == 24
    assert 0 < local["num_correct"] < 24
    post = local["teachers"][0]
    assert 0.5 < post["auroc"]["low"] <= post["auroc"]["value"] <= post["auroc"]["high"] <= 1
    remote = auroc_command(settings(tmp_path, cache_folder=None), [pool], console=console)
    assert remote["teachers"][0]["teacher"] == "teacher-post (post)"
    assert remote["teachers"][0]["rewards"] == pytest.approx(post["rewards"], abs=1e-4)
    assert remote["is_correct"] == local["is_correct"]
    assert json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8")) == remote
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    console.file.flush()
    printed = (tmp_path / "printed.txt").read_text(encoding="utf-8")
    assert remote["note"] == NO_EVIDENCE and NO_EVIDENCE[:40] in printed


def test_a_teacher_that_is_the_student_rewards_nothing(tmp_path: Path, console: Console) -> None:
    found = auroc_command(settings(tmp_path), [str(MODELS / "student-base")], console=console)
    assert found["teachers"][0]["rewards"] == pytest.approx([0.0] * 24, abs=1e-6)


def test_teachers_are_checked_before_anything_is_sampled(tmp_path: Path, console: Console) -> None:
    tiny_model(1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    good = str(MODELS / "teacher-post")
    for bad, error, message in (
        (str(tmp_path / "other"), VocabularyMismatchError, "map ids to different tokens"),
        (str(tmp_path / "nowhere"), ConfigError, "no such folder"),
        ("http://127.0.0.1:1#post", ConfigError, "must start with redis://"),
    ):
        with pytest.raises(error, match=message):
            auroc_command(settings(tmp_path), [good, bad], console=console)
    with pytest.raises(VocabularyMismatchError, match="map ids to different tokens"):
        continuation_command(
            settings(tmp_path), str(tmp_path / "other"), depths=[1], num_continuations=1, console=console
        )
    with pytest.raises(ConfigError, match="teacher: is missing"):
        auroc_command(settings(tmp_path), [], console=console)
    assert not (tmp_path / "cache").exists()


def test_a_killed_continuation_goes_on_to_the_same_numbers(tmp_path: Path, console: Console) -> None:
    alone = settings(tmp_path / "alone", max_problems=4)
    alone_result = continuation_command(
        alone, str(MODELS / "teacher-post"), depths=[4, 24], num_continuations=2, console=console
    )
    command = [
        sys.executable, "-m", "services.cli", "continuation", "--student", str(MODELS / "student-base"), "--teacher",
        str(MODELS / "teacher-post"), "--data", alone.data, "--depths", "4,24", "--num-samples", "3", "--seed", "2",
        "--num-continuations", "2", "--temperature", "1", "--top-p", "1", "--max-response-tokens", "160",
        "--max-problems", "4", "--device", "cpu", "--max-slots", "2", "--cache", str(tmp_path / "cache"),
        "--figure", str(tmp_path / "figure.png"),
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    # The second file is that of the teacher's first continuations.
    while len(list((tmp_path / "cache").glob("*.jsonl"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "figure.png").exists()
    again = settings(tmp_path, max_problems=4)
    found = continuation_command(
        again, str(MODELS / "teacher-post"), depths=[4, 24], num_continuations=2, console=console
    )
    assert found == alone_result
    assert found["num_selected"] > 0 and (tmp_path / "out" / "figure.png").exists()
