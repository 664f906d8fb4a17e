"""What a run may go on with, and what of an earlier attempt it must not count, with the real parts."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from opd.errors import CheckpointError
from opd.settings import load_settings
from services.trainer.assembly import assemble
from services.trainer.config import TrainSettings
from services.trainer.run_log import read_steps
from services.trainer.stop import StopSignal
from services.trainer.training_run import TrainingRun
from tests.unit.trainer.tiny_training import tiny_model, tiny_tokenizer

WEIGHTS = ("data.source_weights.sums=1", "data.source_weights.words=3")


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A model folder with `prompts.jsonl` in it: eight prompts, four of each source."""
    folder = tmp_path / "student"
    tiny_model(1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    write_prompts(folder, "sums", "words")
    return folder


def write_prompts(folder: Path, *sources: str) -> None:
    rows = [{"prompt": f"w{2 + index}", "data_source": sources[index % 2]} for index in range(8)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def make_run(student: Path, *more: str, resume: bool = False) -> TrainingRun:
    overrides = [
        f"student.model={student}", f'data.files=["{student}/prompts.jsonl"]', f"run_dir={student.parent / 'run'}",
        "rollout.prompts_per_step=2", "rollout.max_prompt_tokens=20", "rollout.max_response_tokens=8",
        "objective.score_top_k=6", "teacher.kind=self", "student.device=cpu", "http.enabled=false", *more,
    ]  # fmt: skip
    return assemble(load_settings(TrainSettings, None, overrides), StopSignal(), resume=resume)


def train(run: TrainingRun) -> None:
    try:
        run.train()
    finally:
        run.close()


def steps_of(student: Path) -> list[int]:
    return [record["step"] for record in read_steps(student.parent / "run")]


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            [],
            ["rollout.prompts_per_step=3"],
            r"made with rollout\.prompts_per_step=2, now it is 3, so that prompts would",
        ),
        ([], WEIGHTS, r"with data\.source_weights=unset, now it is \{'sums': 1\.0, 'words': 3\.0\}, so"),
        (WEIGHTS, [], r"with data\.source_weights=\{'sums': 1\.0, 'words': 3\.0\}, now it is unset, so"),
        (
            WEIGHTS,
            ["data.source_weights.sums=2", "data.source_weights.words=3"],
            r"weights=\{'sums': 1\.0, .*now it is \{'sums': 2\.0, .* set it back, or use another run_dir$",
        ),
    ],
    ids=["prompts a step", "weights set", "weights unset", "other weights"],
)
def test_settings_that_decide_which_prompts_a_step_has(
    student: Path, before: Sequence[str], now: Sequence[str], message: str
) -> None:
    train(make_run(student, "steps=1", *before))
    with pytest.raises(CheckpointError, match=message):
        make_run(student, "steps=2", *now, resume=True)
    train(make_run(student, "steps=2", *before, resume=True))
    assert steps_of(student) == [1, 2]


def test_prompts_that_have_changed_sources_are_others_where_sources_take_turns(student: Path) -> None:
    train(make_run(student, "steps=1", *WEIGHTS))
    write_prompts(student, "words", "sums")
    with pytest.raises(CheckpointError, match="was made with other prompts or another seed"):
        make_run(student, "steps=2", *WEIGHTS, resume=True)


def test_a_source_that_nobody_asks_for_may_change(student: Path) -> None:
    train(make_run(student, "steps=1"))
    write_prompts(student, "words", "sums")
    train(make_run(student, "steps=2", resume=True))
    assert steps_of(student) == [1, 2]


def test_a_record_of_an_earlier_version_has_no_digest_of_the_sources(student: Path) -> None:
    train(make_run(student, "steps=1", *WEIGHTS))
    path = student.parent / "run/checkpoints/step-000001/trainer/state.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["record_sha256"]
    record["prompts_digest"], point, sources = record["prompts_digest"].partition(".")
    assert point and sources
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"rollout\.prompts_per_step=2, now it is 4"):
        make_run(student, "steps=2", *WEIGHTS, "rollout.prompts_per_step=4", resume=True)
    train(make_run(student, "steps=2", *WEIGHTS, resume=True))
    assert steps_of(student) == [1, 2]
