"""What is left to do, from what lies in the store."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.arms import Arm, Command, needs
from experiments.availability import missing_needs
from experiments.experiment import load, names
from experiments.plan import EVALUATION_MINUTES, estimated_minutes, pieces, plan_table
from experiments.store import MADE, Store, evaluations_of

ARM = Arm(student="student-base", teacher="teacher-post", minutes=1.5)
COMMAND = Command(
    name="cold-start", arguments=(), student="student-base", teacher="teacher-other", product="model", minutes=3.0
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(folder=tmp_path)


def finish_run(store: Store, arm: Arm, seed: int, state: str = "finished") -> None:
    folder = store.run_folder(arm, seed)
    (folder / "checkpoints" / "step-000032").mkdir(parents=True)
    (folder / "train_summary.json").write_text(json.dumps({"state": state}), encoding="utf-8")


def grade(store: Store, arm: Arm) -> None:
    for job in evaluations_of(arm):
        path = store.evaluation_file(*job)
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}", encoding="utf-8")


def test_an_arm_is_its_seeds_and_their_grading(store: Store) -> None:
    found = pieces([ARM], store)
    assert [piece.seed for piece in found] == [0, 1, 2, None]
    assert sum(piece.minutes for piece in found) == pytest.approx(4.5)


def test_what_is_there_is_not_done_again(store: Store) -> None:
    finish_run(store, ARM, 0)
    finish_run(store, ARM, 1, state="stopped")
    assert [piece.seed for piece in pieces([ARM], store)] == [1, 2, None]


def test_what_is_trained_is_graded_and_then_there_is_nothing_left(store: Store) -> None:
    for seed in ARM.seeds:
        finish_run(store, ARM, seed)
    (grading,) = pieces([ARM], store)
    assert (grading.seed, grading.minutes) == (None, pytest.approx(3 * EVALUATION_MINUTES))
    grade(store, ARM)
    assert pieces([ARM], store) == []


def test_a_command_counts_once_it_has_ended_well(store: Store) -> None:
    folder = store.command_folder(COMMAND)
    (folder / "model").mkdir(parents=True)
    assert [piece.maker for piece in pieces([COMMAND], store)] == [COMMAND]
    (folder / MADE).write_text("{}", encoding="utf-8")
    assert pieces([COMMAND], store) == []
    assert store.model_folder(COMMAND) == folder / "model"


def test_what_an_arm_starts_from_is_made_before_it() -> None:
    experiment = load("fig09_template")
    makers = experiment.makers()
    arm = next(iter(experiment.arms.values()))
    assert makers.index(arm.teacher) < makers.index(arm)


def test_shared_arms_are_counted_once(store: Store) -> None:
    two = [load("fig04_new_knowledge"), load("fig06_success_failure")]
    assert estimated_minutes(two, store) == pytest.approx(estimated_minutes(two[:1], store))


def test_the_plan_names_every_arm_and_what_it_lacks(store: Store) -> None:
    table = plan_table([load(name) for name in names()], store)
    assert table.row_count >= 40
    states = set(table.columns[-1]._cells)
    assert "shared" in states and "to run" in states


def test_needs_are_of_everything_that_has_to_be_made() -> None:
    arm = replace(ARM, student=COMMAND, teacher=replace(ARM, settings={"objective.kind": "sampled_token"}))
    assert needs(arm) == {"opd cold-start", "objective.kind=sampled_token"}
    assert missing_needs({"opd train", "objective.kind=top_k", "opd fly", "objective.kind=luck"}) == [
        "objective.kind=luck",
        "opd fly",
    ]
