"""How a run ends by an error that nobody has foreseen, with the real parts."""

import json
from pathlib import Path
from typing import Any

import pytest

from opd.settings import load_settings
from services.trainer.assembly import assemble
from services.trainer.config import TrainSettings
from services.trainer.run_log import EVENTS_FILE, SUMMARY_FILE, read_steps
from services.trainer.step_metrics import StepMetrics
from services.trainer.stop import StopSignal
from services.trainer.student import StudentOptimizer
from services.trainer.training_run import TrainingRun
from tests.unit.trainer.tiny_training import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    tiny_model(1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = [{"prompt": f"w{2 + index}"} for index in range(8)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder


def make_run(student: Path, run_dir: Path, *, resume: bool = False) -> TrainingRun:
    overrides = [
        f"student.model={student}", f'data.files=["{student}/prompts.jsonl"]', f"run_dir={run_dir}", "steps=3",
        "rollout.prompts_per_step=2", "rollout.max_prompt_tokens=20", "rollout.max_response_tokens=8",
        "objective.score_top_k=6", "teacher.kind=self", "student.device=cpu", "http.enabled=false",
    ]  # fmt: skip
    return assemble(load_settings(TrainSettings, None, overrides), StopSignal(), resume=resume)


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int) -> None:
    """The method works but for its `call`th call, which does everything and then fails."""
    real, calls = getattr(owner, name), []

    def failing(self: Any, *given: Any) -> Any:
        found = real(self, *given)
        calls.append(given)
        if len(calls) == call:
            raise RuntimeError("device-side assert")
        return found

    monkeypatch.setattr(owner, name, failing)


def train_and_fail(run: TrainingRun) -> None:
    try:
        with pytest.raises(RuntimeError, match=r"^device-side assert$"):
            run.train()
    finally:
        run.close()


def ends(run_dir: Path) -> list[tuple[str, Any]]:
    events = [json.loads(line) for line in (run_dir / EVENTS_FILE).read_text(encoding="utf-8").splitlines()]
    return [(event["event"], event.get("message", event.get("state"))) for event in events if event["event"] != "start"]


def test_it_is_saved_and_can_be_resumed(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, StepMetrics, "summarize", 2)
    train_and_fail(make_run(student, tmp_path))
    assert [kind for kind, _ in ends(tmp_path)] == ["teachers", "error", "checkpoint", "end"]
    assert ("error", "RuntimeError: device-side assert") in ends(tmp_path) and ends(tmp_path)[-1] == ("end", "failed")
    assert json.loads((tmp_path / SUMMARY_FILE).read_text())["state"] == "failed"
    monkeypatch.undo()
    run = make_run(student, tmp_path, resume=True)
    try:
        run.train()
    finally:
        run.close()
    assert [record["step"] for record in read_steps(tmp_path)] == [1, 3], "the second step was taken, but not measured"


def test_weights_between_two_steps_are_not_saved(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, StudentOptimizer, "step", 2)
    train_and_fail(make_run(student, tmp_path))
    assert ends(tmp_path)[-1] == ("end", "failed")
    assert not (tmp_path / "checkpoints").exists()


def test_a_failure_to_save_does_not_hide_the_error(
    student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, StepMetrics, "summarize", 2)
    run = make_run(student, tmp_path)
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    train_and_fail(run)
    assert "the failed run could not be put in order: checkpoint " in caplog.text
