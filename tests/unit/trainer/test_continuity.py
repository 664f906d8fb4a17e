"""What a run may go on with, and what of an earlier attempt it must not count, with the real parts."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from opd.errors import CheckpointError
from opd.settings import load_settings
from services.trainer.assembly import assemble
from services.trainer.config import TrainSettings
from services.trainer.probe import PROBE_FILE, read_probe
from services.trainer.run_log import read_steps
from services.trainer.stop import StopSignal
from services.trainer.training_run import TrainingRun
from tests.unit.trainer.tiny_training import tiny_model, tiny_tokenizer

WEIGHTS = ("data.source_weights.sums=1", "data.source_weights.words=3")


PROBED = ("rollout.prompts_per_step=4", "rollout.rollouts_per_prompt=2", "checkpoint.every_steps=1")
"""Enough rollouts a step for a gradient probe."""
COHERENCE = "distill/gradient_coherence"


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


def coherences(run_dir: Path) -> dict[int, float | None]:
    return {record["step"]: record.get(COHERENCE) for record in read_steps(run_dir)}


@pytest.mark.parametrize("resume", [True, False], ids=["resumed", "begun again"])
def test_killed_between_the_probe_and_the_line_of_its_step(student: Path, resume: bool) -> None:
    """All that a kill leaves there is the probe, here of other rollouts: what is measured is the new run's own."""
    settings = (*PROBED, "steps=2", "metrics.coherence_every_steps=2")
    train(make_run(student, "seed=5", *settings))
    run_dir, whole = student.parent / "run", student.parent / "whole"
    probe = (run_dir / PROBE_FILE).read_bytes()
    shutil.rmtree(run_dir)
    run_dir.mkdir()
    (run_dir / PROBE_FILE).write_bytes(probe)
    train(make_run(student, *settings, resume=resume))
    train(make_run(student, *settings, f"run_dir={whole}"))
    assert None not in coherences(whole).values()
    assert coherences(run_dir) == coherences(whole)


def test_a_probe_that_was_taken_after_the_checkpoint_is_taken_again(student: Path) -> None:
    run_dir = student.parent / "run"
    settings = (*PROBED, "steps=3", "checkpoint.keep_last=3", "metrics.coherence_every_steps=5")
    train(make_run(student, *PROBED, "steps=1", "metrics.coherence_every_steps=0"))
    train(make_run(student, *settings, resume=True))
    measured = coherences(run_dir)
    assert [step for step, value in measured.items() if value is not None] == [2]
    assert read_probe(run_dir / PROBE_FILE).step == 2
    taken = (run_dir / PROBE_FILE).read_bytes()
    # One that the checkpoint knows of stays.
    shutil.rmtree(run_dir / "checkpoints/step-000003")
    train(make_run(student, *settings, resume=True))
    assert coherences(run_dir) == measured and (run_dir / PROBE_FILE).read_bytes() == taken
    for step in (2, 3):
        shutil.rmtree(run_dir / f"checkpoints/step-00000{step}")
    train(make_run(student, *settings, resume=True))
    assert coherences(run_dir) == measured
