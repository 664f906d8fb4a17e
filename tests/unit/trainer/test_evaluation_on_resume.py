"""Evaluations that a run's end kept from being taken are taken when it goes on, and each counts once."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd.settings import load_settings
from services.trainer.alarms.desk import StoppedByAlarm
from services.trainer.assembly import assemble
from services.trainer.config import TrainSettings
from services.trainer.evaluator import Evaluator
from services.trainer.run_log import EVENTS_FILE, SUMMARY_FILE
from services.trainer.stop import StopRequested, StopSignal
from tests.unit.trainer.tiny_training import tiny_model, tiny_tokenizer

Train = Callable[..., None]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Trains in `run`, evaluated after every step and saved after each, as told otherwise."""
    tiny_model(1).save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    for name, answer in (("prompts", None), ("sums", "7")):
        rows = [{"prompt": f"w{2 + index}", "reward_model": {"ground_truth": answer}} for index in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    overrides = [
        f"student.model={tmp_path}/student", f'data.files=["{tmp_path}/prompts.jsonl"]', f"run_dir={tmp_path}/run",
        "rollout.prompts_per_step=2", "rollout.max_prompt_tokens=20", "rollout.max_response_tokens=8",
        "objective.score_top_k=6", "teacher.kind=self", "student.device=cpu", "http.enabled=false", "steps=4",
        f'evaluation.files=["{tmp_path}/sums.jsonl"]', "evaluation.template=boxed", "evaluation.every_steps=1",
        "evaluation.num_samples=1", "evaluation.max_response_tokens=4", "checkpoint.every_steps=1",
    ]  # fmt: skip

    def train(*more: str, resume: bool = False) -> None:
        with StopSignal() as stop:
            run = assemble(load_settings(TrainSettings, None, [*overrides, *more]), stop, resume=resume)
            try:
                run.train()
            finally:
                run.close()

    return train


def before_evaluating(monkeypatch: pytest.MonkeyPatch, step: int, happens: Callable[[], None]) -> None:
    """Only the first time: everything else is as it is."""
    real = Evaluator.evaluate

    def evaluate(self: Evaluator, at: int) -> dict[str, float]:
        if at == step:
            monkeypatch.undo()
            happens()
        return real(self, at)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def evaluated(run_dir: Path) -> list[int]:
    lines = (run_dir / EVENTS_FILE).read_text(encoding="utf-8").splitlines()
    return [event["step"] for event in map(json.loads, lines) if event["event"] == "evaluation"]


def summarized(run_dir: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))["evaluations"]
    return found


@pytest.mark.parametrize("step", [0, 2, 4], ids=["before the first step", "in between", "after the last"])
def test_one_that_a_signal_ends_is_taken_by_the_resumed_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    before_evaluating(monkeypatch, step, terminate)
    with pytest.raises(StopRequested):
        train()
    assert evaluated(tmp_path / "run") == list(range(step))
    assert [entry["step"] for entry in summarized(tmp_path / "run")] == list(range(step))
    train(resume=True)
    assert evaluated(tmp_path / "run") == [0, 1, 2, 3, 4]
    assert [entry["step"] for entry in summarized(tmp_path / "run")] == [0, 1, 2, 3, 4]
    assert all(set(entry) == {"step", "accuracy/sums"} for entry in summarized(tmp_path / "run"))


def test_an_alarm_that_stops_the_run_leaves_its_steps_evaluation_to_the_resumed_one(
    train: Train, tmp_path: Path
) -> None:
    """A rule that looks at three steps, with a bound that makes every advantage a small one."""
    settings = (
        'alarms.stop=["low_overlap_mass"]', "alarms.low_overlap_mass.max_advantage=100", "evaluation.every_steps=3",
    )  # fmt: skip
    with pytest.raises(StoppedByAlarm, match="low_overlap_mass at step 3"):
        train(*settings)
    assert evaluated(tmp_path / "run") == [0]
    train(*settings, resume=True)
    assert evaluated(tmp_path / "run") == [0, 3, 4]


def test_a_step_that_is_taken_again_is_evaluated_again_and_counts_once(train: Train, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train("checkpoint.keep_last=4")
    for step in (3, 4):
        shutil.rmtree(run_dir / f"checkpoints/step-{step:06d}")
    train(resume=True)
    assert evaluated(run_dir) == [0, 1, 2, 3, 4, 3, 4]
    assert [entry["step"] for entry in summarized(run_dir)] == [0, 1, 2, 3, 4]


def test_what_an_attempt_that_is_gone_has_evaluated_is_no_evaluation_of_this_one(train: Train, tmp_path: Path) -> None:
    run_dir, aside = tmp_path / "run", tmp_path / "aside"
    train("steps=3", "checkpoint.every_steps=0")
    (run_dir / "checkpoints/step-000003").rename(aside)
    # Without a checkpoint all begins anew: of what was evaluated before nothing counts.
    train("steps=2", resume=True)
    assert [entry["step"] for entry in summarized(run_dir)] == [0, 1, 2]
    aside.rename(run_dir / "checkpoints/step-000003")
    train(resume=True)
    assert evaluated(run_dir) == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert [entry["step"] for entry in summarized(run_dir)] == [0, 1, 2, 3, 4]


def test_what_is_not_due_is_not_taken_and_a_finished_run_takes_nothing_again(train: Train, tmp_path: Path) -> None:
    settings = ("steps=2", "evaluation.every_steps=0", "evaluation.before=false", "evaluation.after=false")
    train(*settings)
    train("evaluation.every_steps=3", "evaluation.before=false", resume=True)
    assert evaluated(tmp_path / "run") == [3, 4]
    train(resume=True)
    assert evaluated(tmp_path / "run") == [3, 4]
    assert [entry["step"] for entry in summarized(tmp_path / "run")] == [3, 4]
