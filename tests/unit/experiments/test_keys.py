"""A run's identity: what decides its outcome counts, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments import keys
from experiments.arms import Arm, Command, Evaluation

ARM = Arm(student="student-base", teacher="teacher-post")
COMMAND = Command(
    name="cold-start", arguments=('data.files=["{data}/train_2.jsonl"]',), student="student-base",
    teacher="teacher-other", product="model", minutes=1.0,
)  # fmt: skip


def test_a_setting_given_at_the_bases_value_is_the_same_run() -> None:
    assert keys.run_key(replace(ARM, settings={"objective.score_top_k": 8}), 0) == keys.run_key(ARM, 0)


def test_how_it_is_graded_and_how_long_it_takes_make_no_other_run() -> None:
    other = replace(ARM, evaluation=Evaluation(num_samples=4), minutes=100.0)
    assert keys.run_key(other, 0) == keys.run_key(ARM, 0)
    assert keys.evaluation_key(other, other.evaluation, 0) != keys.evaluation_key(ARM, ARM.evaluation, 0)


@pytest.mark.parametrize(
    "other",
    [
        replace(ARM, student="teacher-big"),
        replace(ARM, teacher="teacher-big"),
        replace(ARM, data=("train_2.jsonl",)),
        replace(ARM, settings={"optim.lr": 1e-4}),
        replace(ARM, settings={"steps": 33}),
        replace(ARM, teacher=COMMAND),
        replace(ARM, student=ARM),
        replace(ARM, teacher=None),
    ],
)
def test_what_decides_the_outcome_makes_another_run(other: Arm) -> None:
    assert keys.run_key(other, 0) != keys.run_key(ARM, 0)


def test_every_seed_is_a_run_of_its_own() -> None:
    assert len({keys.run_key(ARM, seed) for seed in range(3)}) == 3
    assert len({keys.evaluation_key(ARM, ARM.evaluation, seed) for seed in range(3)}) == 3


def test_a_trained_model_is_known_by_how_it_was_trained() -> None:
    assert keys.fingerprint(ARM) == keys.run_key(ARM, 0)
    assert keys.fingerprint(COMMAND) == keys.command_key(COMMAND)
    assert keys.command_key(replace(COMMAND, arguments=('data.files=["{data}/train.jsonl"]',))) != keys.fingerprint(
        COMMAND
    )
    assert keys.evaluation_key(ARM, ARM.evaluation) == keys.evaluation_key(ARM, ARM.evaluation, 0)


def test_bundled_models_are_known_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MODELS", tmp_path)
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights" if name != "three" else b"others")
        (tmp_path / name / "card.json").write_text(name, encoding="utf-8")
    assert keys.fingerprint("one") == keys.fingerprint("two") != keys.fingerprint("three")
