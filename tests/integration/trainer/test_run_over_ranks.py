"""A whole run under torchrun: the numbers of one process, one set of files, and one way to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.trainer.tiny_training import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[3]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ADAPTER = "checkpoints/step-000003/adapter/adapter_model.safetensors"
MOVING_AVERAGE = "checkpoints/step-000003/trainer/moving_average.safetensors"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher and prompts."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in ((1, "student"), (2, "teacher")):
        tiny_model(seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": [{"role": "user", "content": f"w{2 + i} w{5 + i}"}], "data_source": "tiny"} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder


def command(world: Path, run_dir: Path, *more: str, ranks: int = 1) -> list[str]:
    launcher = TORCHRUN if ranks > 1 else [sys.executable, "-m"]
    return [
        *launcher,
        "services.trainer",
        f"student.model={world / 'student'}",
        "student.device=cpu",
        f'data.files=["{world / "prompts.jsonl"}"]',
        "teacher.kind=folder",
        f"teacher.model={world / 'teacher'}",
        f"run_dir={run_dir}",
        "rollout.prompts_per_step=3",
        "rollout.rollouts_per_prompt=2",
        "rollout.max_prompt_tokens=20",
        "rollout.max_response_tokens=16",
        "student.max_micro_batch_tokens=40",
        "objective.score_top_k=6",
        "metrics.coherence_every_steps=0",
        "optim.lr=1e-3",
        "http.enabled=false",
        "steps=3",
        *more,
    ]


def train(world: Path, run_dir: Path, *more: str, ranks: int = 1, code: int = 0) -> str:
    done = subprocess.run(
        command(world, run_dir, *more, ranks=ranks), env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(value: Any) -> list[float]:
    """A metric as floats; an empty bucket, which is null, is a number that no metric has."""
    return [-1e9 if item is None else float(item) for item in (value if isinstance(value, list) else [value])]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if not name.startswith("tim"):
                assert numbers(ours[name]) == pytest.approx(numbers(value), rel=1e-4, abs=1e-5), (name, theirs["step"])


def test_the_metrics_are_those_of_one_process_and_it_goes_on_alone(world: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "alone")
    said = train(world, tmp_path / "both", "steps=2", ranks=2)
    assert said.count("step 2/2") == 1  # One rank speaks.
    assert_same(metrics(tmp_path / "both"), metrics(tmp_path / "alone")[:2])
    kinds = [json.loads(line)["event"] for line in (tmp_path / "both/events.jsonl").read_text().splitlines()]
    assert kinds.count("start") == kinds.count("end") == kinds.count("checkpoint") == 1
    summary = json.loads((tmp_path / "both/train_summary.json").read_text())
    assert (summary["rollouts_sent"], summary["rollouts_scored"], summary["rollouts_lost"]) == (12, 12, 0)
    train(world, tmp_path / "both", "--resume")
    assert_same(metrics(tmp_path / "both"), metrics(tmp_path / "alone"))


def test_adapters_are_those_of_one_process(world: Path, tmp_path: Path) -> None:
    """All ranks begin with the same adapters, and sample through them."""
    train(world, tmp_path / "alone", "student.lora.rank=3")
    train(world, tmp_path / "both", "student.lora.rank=3", ranks=2)
    assert_same(metrics(tmp_path / "both"), metrics(tmp_path / "alone"))
    weights = [load_file(tmp_path / run / ADAPTER) for run in ("both", "alone")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=0, atol=5e-5, msg=name)


def test_the_horizon_is_that_of_one_process(world: Path, tmp_path: Path) -> None:
    """It moves by what all ranks have seen, where one alone has too few positions to judge, and by their alarms."""
    horizon = ["start=8", "growth=1.5", "reliable_at=0.8", "unreliable_below=0.7", "min_positions=7"]
    settings = [f"objective.horizon.{setting}" for setting in horizon]
    settings += ["steps=4", 'alarms.shorten=["low_overlap_mass"]', "alarms.low_overlap_mass.max_advantage=10"]
    train(world, tmp_path / "alone", *settings)
    train(world, tmp_path / "both", *settings, ranks=2)
    found, expected = metrics(tmp_path / "both"), metrics(tmp_path / "alone")
    assert_same(found, expected)
    for name in ("horizon/length", "horizon/reliability"):
        assert [record.get(name) for record in found] == [record.get(name) for record in expected]
    assert [record["horizon/length"] for record in found] == [8, 12, 8, 4]


def test_rollouts_are_as_old_as_in_one_process(world: Path, tmp_path: Path) -> None:
    """Two steps are sampled before the first is trained, also after a resume, and each is trained once.

    Rank 0 evaluates after each, and after the last but one nobody samples before the next backward pass.
    """
    row = {"prompt": "w3 w4", "reward_model": {"ground_truth": "7"}}
    (tmp_path / "problems.jsonl").write_text(f"{json.dumps(row)}\n", encoding="utf-8")
    lag = ["pipeline.max_policy_lag=1", "objective.staleness_cap=2.0"]
    lag += [f'evaluation.files=["{tmp_path / "problems.jsonl"}"]', "evaluation.template=boxed"]
    lag += ["evaluation.every_steps=1", "evaluation.num_samples=1", "evaluation.max_response_tokens=4"]
    for name, ranks in (("alone", 1), ("both", 2)):
        train(world, tmp_path / name, "steps=3", *lag, ranks=ranks)
        train(world, tmp_path / name, "steps=5", *lag, "--resume", ranks=ranks)
    found = metrics(tmp_path / "both")
    assert_same(found, metrics(tmp_path / "alone"))
    assert [record["rollout/policy_lag"] for record in found] == [0, 1, 1, 0, 1]
    assert found[1]["loss/staleness_weight"] != pytest.approx(1.0, abs=1e-3)
    summary = json.loads((tmp_path / "both/train_summary.json").read_text())
    assert [summary[f"rollouts_{name}"] for name in ("sent", "scored", "lost", "abandoned")] == [30, 30, 0, 0]


def test_a_moving_average_follows_a_student_in_shards(world: Path, tmp_path: Path) -> None:
    """All ranks are taught by the average of one process, which goes on in one."""
    moving = ["teacher.kind=self", 'teacher.model=""', "teacher.ema_decay=0.5", "data.teacher_context= w9 w4"]
    train(world, tmp_path / "alone", *moving)
    train(world, tmp_path / "both", *moving, "steps=2", "checkpoint.every_steps=1", ranks=2)
    assert_same(metrics(tmp_path / "both"), metrics(tmp_path / "alone")[:2])
    # Half of the way to the whole fp32 weights, to the bit.
    steps = [tmp_path / f"both/checkpoints/step-00000{step}" for step in (1, 2)]
    before, after = (load_file(step / "trainer/moving_average.safetensors") for step in steps)
    weights = load_file(steps[1] / "model.safetensors")
    assert all(torch.equal(after[name], before[name].lerp(weights[name], 0.5)) for name in weights)
    train(world, tmp_path / "both", *moving, "--resume")
    found, expected = metrics(tmp_path / "both"), metrics(tmp_path / "alone")
    assert_same(found, expected)
    assert found[0]["loss/reverse_kl"] > 1e-3
    averages = [load_file(tmp_path / run / MOVING_AVERAGE) for run in ("both", "alone")]
    initial = load_file(world / "student/model.safetensors")
    assert averages[0].keys() == averages[1].keys()
    for name, value in averages[1].items():
        torch.testing.assert_close(averages[0][name], value, rtol=0, atol=2e-5, msg=name)
        assert not torch.equal(value, initial[name])


def test_sigterm_saves_what_is_complete(world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = command(world, run_dir, "steps=100000", ranks=2)
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(args, env=ENV, cwd=ROOT, stderr=stderr)
    try:
        deadline = time.monotonic() + 80
        while not (run_dir / "metrics.jsonl").is_file() or len(metrics(run_dir)) < 2:
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "stderr").read_text()[-2000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) != 0
    finally:
        process.kill()
        process.wait(10)
    steps = [record["step"] for record in metrics(run_dir)]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{steps[-1]:06d}"]
    assert json.loads((run_dir / "train_summary.json").read_text())["state"] == "stopped"


def test_sigterm_ends_an_evaluation_at_once(world: Path, tmp_path: Path) -> None:
    run_dir, problems = tmp_path / "run", tmp_path / "problems.jsonl"
    row = {"prompt": "w3 w4", "reward_model": {"ground_truth": "7"}}
    problems.write_text(f"{json.dumps(row)}\n", encoding="utf-8")
    evaluation = ["every_steps=1", "before=false", "template=boxed", "num_samples=100000", "max_response_tokens=16"]
    files = f'evaluation.files=["{problems}"]'
    args = command(world, run_dir, files, *(f"evaluation.{setting}" for setting in evaluation), ranks=2)
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(args, env=ENV, cwd=ROOT, stderr=stderr)
    try:
        deadline = time.monotonic() + 80
        while not (run_dir / "metrics.jsonl").is_file() or not metrics(run_dir):
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "stderr").read_text()[-2000:]
            time.sleep(0.2)
        time.sleep(2)  # The evaluation takes minutes.
        process.send_signal(signal.SIGTERM)
        # torchrun kills after 30 s whoever has not ended.
        assert process.wait(25) != 0
    finally:
        process.kill()
        process.wait(10)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000001"]
    assert json.loads((run_dir / "train_summary.json").read_text())["state"] == "stopped"


def test_what_several_processes_cannot_do_is_refused(world: Path, tmp_path: Path) -> None:
    said = train(world, tmp_path / "run", "rollout.prompts_per_step=1", ranks=2, code=1)
    assert "rollout.prompts_per_step=1 is below the 2 processes of the run" in said
    assert "opd train" in said
    assert not (tmp_path / "run/metrics.jsonl").exists()
