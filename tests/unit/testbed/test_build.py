"""The build from its command line: everything, an interruption, and what is skipped the second time."""

import json
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from testbed import stages
from testbed.build import build
from testbed.family import FAST, Scale
from testbed.stages import Build, run_stages

NAMES = {"student-base", "teacher-big", "teacher-other", "teacher-post"}


class Interrupted(Exception):
    """Stands for a process that was ended from outside."""


def fast_build(root: Path, seed: int = 0, stop_at: int = 0, scale: Scale = FAST) -> Build:
    def report(stage: str, update: int, updates: int, loss: float) -> None:
        if update == stop_at:
            raise Interrupted

    return Build(work=root / "work", models=root / "models", seed=seed, scale=scale, report=report)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fast build that was interrupted once and then run to its end from the command line."""
    root = tmp_path_factory.mktemp("build")
    with pytest.raises(Interrupted):
        run_stages(fast_build(root, stop_at=3), None)
    assert not list(root.glob("models/*/card.json"))
    assert (root / "work" / "student-base" / "state.json").exists()
    app = typer.Typer()
    app.command()(build)
    folders = [f"--{name}-dir={root / name}" for name in ("models", "data", "work")]
    result = CliRunner().invoke(app, ["--fast", *folders], catch_exceptions=False)
    assert result.exit_code == 0
    return root


def test_every_model_is_complete(built: Path) -> None:
    assert {folder.name for folder in (built / "models").iterdir()} == NAMES
    assert len(list((built / "data").glob("*.jsonl"))) == 5
    for name in NAMES:
        folder = built / "models" / name
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        assert card["name"] == name
        assert f"# {name}" in (folder / "README.md").read_text(encoding="utf-8")
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id
        assert model.config.vocab_size == len(tokenizer)


def test_an_interrupted_build_ends_like_a_whole_one(built: Path, tmp_path: Path) -> None:
    run_stages(fast_build(tmp_path), "student-base")
    whole, resumed = (
        AutoModelForCausalLM.from_pretrained(root / "models" / "student-base").state_dict()
        for root in (tmp_path, built)
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_finished_stages_are_skipped(built: Path) -> None:
    run_stages(fast_build(built, stop_at=1), None)


def test_another_seed_wants_another_folder(built: Path) -> None:
    with pytest.raises(ValueError, match="built with seed 0, not 1"):
        run_stages(fast_build(built, seed=1), None)


def test_post_training_wants_its_base(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="starts from student-base"):
        run_stages(fast_build(tmp_path), "teacher-post")


def test_an_unknown_name_lists_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="student-base, teacher-big, teacher-other, teacher-post"):
        run_stages(fast_build(tmp_path), "teacher")


def test_a_model_without_right_answers_is_left_as_it_is(built: Path) -> None:
    accuracy = json.loads((built / "work" / "teacher-post" / "round-1" / "accuracy.json").read_text(encoding="utf-8"))
    assert set(accuracy) == {"1", "2", "3", "4", "long"}
    assert stages.POST_NAME == "teacher-post"
