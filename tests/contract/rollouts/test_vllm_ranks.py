"""`torchrun -m services.trainer` with rollouts on vLLM: an engine to a rank, one process's numbers, one end for all."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from services.trainer.run_log import read_steps
from tests.contract.engines.test_vllm_process import assert_none_is_left, marked_processes
from tests.contract.rollouts.conftest import MODELS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[3]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


def command(run_dir: Path, *more: str, ranks: int) -> list[str]:
    """Three prompts: of two ranks one has twice the rollouts of the other."""
    return [
        *(sys.executable, "-m", *(TORCHRUN if ranks > 1 else []), "services.trainer"),
        f"student.model={MODELS / 'student-base'}",
        "student.device=cpu",
        f'data.files=["{MODELS.parent / "data/train.jsonl"}"]',
        "teacher.kind=folder",
        f"teacher.model={MODELS / 'teacher-post'}",
        f"run_dir={run_dir}",
        "rollout.engine=vllm",
        "rollout.vllm.enforce_eager=true",
        f"rollout.vllm.kv_cache_bytes={128 << 20}",
        f"rollout.vllm.weights_folder={run_dir.parent}",
        "rollout.prompts_per_step=3",
        "rollout.rollouts_per_prompt=2",
        "rollout.max_prompt_tokens=128",
        "rollout.max_response_tokens=32",
        "objective.score_top_k=8",
        "student.max_micro_batch_tokens=200",
        "metrics.coherence_every_steps=0",
        "optim.lr=1e-3",
        "http.enabled=false",
        *more,
    ]


@contextmanager
def started(run_dir: Path, *more: str, ranks: int) -> Iterator["subprocess.Popen[bytes]"]:
    """What it says goes to `run_dir`.stderr; it is ended with the block."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with said(run_dir).open("wb") as stderr:
        process = subprocess.Popen(command(run_dir, *more, ranks=ranks), cwd=ROOT, env=environment, stderr=stderr)
        try:
            yield process
        finally:
            process.kill()
            process.wait(20)


def said(run_dir: Path) -> Path:
    return run_dir.with_suffix(".stderr")


def train(run_dir: Path, *more: str, ranks: int) -> list[dict[str, Any]]:
    with started(run_dir, *more, ranks=ranks) as process:
        assert process.wait(200) == 0, said(run_dir).read_text()[-3000:]
    return list(read_steps(run_dir))


def wait_for_a_step(process: "subprocess.Popen[bytes]", run_dir: Path) -> None:
    deadline = time.monotonic() + 150
    while not (run_dir / "metrics.jsonl").is_file() or not read_steps(run_dir):
        assert time.monotonic() < deadline and process.poll() is None, said(run_dir).read_text()[-3000:]
        time.sleep(0.1)


def with_command(mark: str, word: str, environment: str = "") -> list[int]:
    """Marked processes that were started with this word and this variable."""
    found = []
    for pid in sorted(marked_processes(mark)):
        folder = Path("/proc") / str(pid)
        if word.encode() in (folder / "cmdline").read_bytes().split(b"\0") and (
            not environment or environment.encode() in (folder / "environ").read_bytes().split(b"\0")
        ):
            found.append(pid)
    return found


def test_two_ranks_train_adapters_on_rollouts_of_two_engines_as_one_does(tmp_path: Path, mark: str) -> None:
    problems = (MODELS.parent / "data/heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "heldout.jsonl").write_text("".join(problems[:8]), encoding="utf-8")
    evaluation = [f'evaluation.files=["{tmp_path / "heldout.jsonl"}"]', "evaluation.num_samples=1"]
    evaluation += ["evaluation.before=false", "evaluation.max_response_tokens=8"]
    # The engines are given the merged weights.
    adapters = ["student.lora.rank=4", "optim.lr=1e-2"]
    both = train(tmp_path / "both", *evaluation, *adapters, "steps=3", ranks=2)
    assert [record["step"] for record in both] == [1, 2, 3]
    for record in both:
        # The larger one of both engines.
        assert 0 <= record["rollout/engine_drift"] < 1e-4
        assert record["queue/rollouts_sent"] == record["queue/rollouts_scored"] == 6
        assert math.isfinite(record["loss/reverse_kl"]) and math.isfinite(record["optim/grad_norm"])
        assert 0 < record["distill/entropy_student"] < 5
    summary = json.loads((tmp_path / "both/train_summary.json").read_text(encoding="utf-8"))
    assert summary["state"] == "finished" and "accuracy/heldout" in summary["evaluations"][-1]
    before = load_file(MODELS / "student-base/model.safetensors")
    after = load_file(tmp_path / "both/checkpoints/step-000003/model.safetensors")
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-3
    assert {path.name for path in (tmp_path / "both").glob("*.log")} == {"rollout-engine.log", "rollout-engine-1.log"}
    (alone,) = train(tmp_path / "alone", *adapters, "steps=1", ranks=1)
    # Seeds are those of rollouts, so whichever engine samples one, the tokens are the same.
    assert both[0].keys() == alone.keys()
    numbers = {name: value for name, value in alone.items() if isinstance(value, float) and name[:6] != "timing"}
    assert {name: both[0][name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-4)
    assert list(tmp_path.glob("opd-rollout-*")) == []
    assert_none_is_left(mark)


def test_a_killed_engine_is_an_error_of_both_ranks_and_the_step_is_saved(tmp_path: Path, mark: str) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, "steps=100000", ranks=2) as process:
        wait_for_a_step(process, run_dir)
        engines = with_command(mark, "services.trainer.rollout.vllm_worker")
        assert len(engines) == len(list(tmp_path.glob("opd-rollout-*"))) == 2
        os.kill(engines[1], signal.SIGKILL)
        assert process.wait(60) != 0
    errors = [line for line in said(run_dir).read_text().splitlines() if line.startswith("opd train: ")]
    assert len(errors) == 2 and all("is gone (killed by SIGKILL)" in line for line in errors), errors
    assert sum(": rank " in line for line in errors) == 1
    last = read_steps(run_dir)[-1]["step"]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{last:06d}"]
    assert list(tmp_path.glob("opd-rollout-*")) == []
    assert_none_is_left(mark)


def test_kill_9_of_a_rank_leaves_no_engine_and_no_folder(tmp_path: Path, mark: str) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, "steps=100000", ranks=2) as process:
        wait_for_a_step(process, run_dir)
        # The engine has nothing of the launcher in its environment, so this is the trainer.
        (rank,) = with_command(mark, "services.trainer", "RANK=1")
        assert len(list(tmp_path.glob("opd-rollout-*"))) == 2
        os.kill(rank, signal.SIGKILL)
        assert process.wait(60) != 0
    assert_none_is_left(mark)
    assert list(tmp_path.glob("opd-rollout-*")) == []
