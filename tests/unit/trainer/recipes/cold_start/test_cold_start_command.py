"""`opd cold-start` on the bundled models: stages, what is taken up again, and the model it leaves."""

import io
import json
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from opd.errors import CheckpointError, ConfigError
from opd.settings import load_settings
from services.trainer.models import load_model
from services.trainer.prompts import PromptProblem, PromptView, load_problems, tokenize_problems
from services.trainer.recipes.cold_start.command import run_cold_start, train_overrides
from services.trainer.recipes.cold_start.config import ColdStartSettings
from services.trainer.recipes.cold_start.rollout_file import TeacherRollout
from services.trainer.recipes.cold_start.selection import ExampleBuilder, Selection, select
from services.trainer.recipes.cold_start.stages import Stage, save_model
from services.trainer.recipes.data.writing import write_rows
from services.trainer.recipes.sft.packing import SftExample

ROOT = Path(__file__).parents[5]
MODELS = ROOT / "testbed" / "models"


def overrides(run_dir: Path) -> list[str]:
    return [
        f"run_dir={run_dir}",
        f"student.model={MODELS / 'student-base'}",
        f"teacher.model={MODELS / 'teacher-post'}",
        f"data.files=['{ROOT / 'testbed/data/train.jsonl'}']",
        "data.template=dapo",
        "data.num_prompts=24",
        "rollout.max_response_tokens=200",
        "rollout.max_slots=8",
        "sft.sequence_tokens=256",
        "sft.max_micro_batch_tokens=1024",
        "sft.rows_per_batch=2",
        "sft.checkpoint_every_steps=1",
        "sft.validation_share=0.1",
        "sft.optim.lr=3e-4",
    ]


def settings(run_dir: Path, *changes: str) -> ColdStartSettings:
    return load_settings(ColdStartSettings, None, [*overrides(run_dir), *changes])


def run(run_dir: Path, *changes: str, until: Stage = Stage.SFT) -> tuple[dict[str, Any], str]:
    written = io.StringIO()
    console = Console(file=written, width=400)
    assert run_cold_start(settings(run_dir, *changes), console, until=until, then_train=None) == 0
    return json.loads((run_dir / "card.json").read_text(encoding="utf-8")), written.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cold start from beginning to end."""
    run_dir = tmp_path_factory.mktemp("cold-start")
    run(run_dir)
    return run_dir


def test_it_leaves_a_model_prompts_and_a_card_that_adds_up(finished: Path) -> None:
    card = json.loads((finished / "card.json").read_text(encoding="utf-8"))
    assert card["prompts"]["cold_start"] == 24
    assert card["prompts"]["remaining"] == len(load_problems(str(finished / "remaining.jsonl")))
    assert card["filters"]["kept"] + sum(card["filters"]["dropped"].values()) == card["rollouts"]["responses"] == 24
    assert card["filters"]["shares_vocabulary"] is True
    assert card["sft"]["examples"] + card["sft"]["validation_examples"] == card["filters"]["kept"]
    # A handful of steps on a handful of examples moves the loss; that it falls is shown where there is more to learn.
    assert 0 < card["sft"]["validation_loss_after"] < 2
    assert card["sft"]["validation_loss_after"] != card["sft"]["validation_loss_before"]
    assert (finished / "sft_loss.png").is_file() and "before and after" in (finished / "card.md").read_text("utf-8")
    before, after = load_model(str(MODELS / "student-base")), load_model(str(finished / "model"))
    assert after.vocabulary == before.vocabulary and after.eos_token_ids == before.eos_token_ids
    assert after.fingerprint != before.fingerprint


def test_the_same_command_again_does_nothing_anew(finished: Path) -> None:
    files = ("rollouts.jsonl", "kept.jsonl", "remaining.jsonl", "model/model.safetensors", "card.json")
    contents = {name: (finished / name).read_bytes() for name in files}
    changed = (finished / "model/model.safetensors").stat().st_mtime_ns
    _, written = run(finished)
    assert "finished already" in written
    assert f"opd train -c CONFIG.toml 'student.model=\"{finished / 'model'}\"'" in written
    assert {name: (finished / name).read_bytes() for name in files} == contents
    assert (finished / "model/model.safetensors").stat().st_mtime_ns == changed


def test_a_finished_model_is_not_passed_off_for_one_of_another_student_or_examples(finished: Path) -> None:
    with pytest.raises(CheckpointError, match="made from another student, examples or settings"):
        run(finished, "sft.optim.lr=1e-4")
    with pytest.raises(CheckpointError, match="made from another student"):
        run(finished, f"student.model={MODELS / 'teacher-post'}")
    with pytest.raises(ConfigError, match="holds rollouts with another temperature"):
        run(finished, "rollout.temperature=1.0")


@pytest.mark.parametrize(
    "change", ["seed=1", "filters.require_correct=true", "sft.sequence_tokens=8", "sft.validation_share=0.2"]
)
def test_what_is_refused_writes_nothing(finished: Path, change: str) -> None:
    contents = _contents(finished)
    with pytest.raises((CheckpointError, ConfigError), match=r"another run_dir|no response is left"):
        run(finished, change)
    assert _contents(finished) == contents


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_may_end_after_each_stage(tmp_path: Path) -> None:
    short = "data.num_prompts=4"
    card, _ = run(tmp_path, short, until=Stage.ROLLOUTS)
    assert card["rollouts"]["responses"] == 4 and "filters" not in card
    card, _ = run(tmp_path, short, until=Stage.FILTER)
    assert "filters" in card and "sft" not in card and not (tmp_path / "model").exists()


def test_responses_cut_off_are_dropped_and_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no response is left to train on"):
        run(tmp_path, "data.num_prompts=4", "rollout.max_response_tokens=5")
    dropped = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["reason"] for record in dropped] == ["truncated"] * 4


def test_a_wrong_training_configuration_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    config = tmp_path / "train.toml"
    config.write_text("[optim]\nlearning_rate = 1.0\n", encoding="utf-8")
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match=r"optim\.learning_rate: no such key"):
        run_cold_start(settings(tmp_path / "run"), console, until=Stage.SFT, then_train=config)
    assert not (tmp_path / "run").exists()


def test_a_column_that_the_remaining_file_cannot_hold_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    prompts = tmp_path / "p.parquet"
    write_rows(prompts, [{"prompt": f"q{index}", "made": datetime(2026, 1, 2, tzinfo=UTC)} for index in range(2)])
    with pytest.raises(ConfigError, match=r"data\.files: remaining\.jsonl: column 'made' .* leave that column out"):
        run(tmp_path / "run", f"data.files=['{prompts}']", "data.num_prompts=1")
    assert not (tmp_path / "run").exists()


def test_the_way_on_survives_odd_paths(tmp_path: Path) -> None:
    from services.trainer.config import TrainSettings

    chosen = settings(tmp_path / 'a "b" c')
    train = load_settings(TrainSettings, None, train_overrides(chosen))
    assert train.student.model == str(chosen.run_dir / "model")
    assert train.data.files == (str(chosen.run_dir / "remaining.jsonl"),)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_in_mid_run_it_goes_on_and_ends_the_same(finished: Path, tmp_path: Path) -> None:
    """SIGKILL while the teacher is sampled, and again while the student is trained."""
    command = [sys.executable, "-m", "services.cli", "cold-start", *overrides(tmp_path)]
    for pattern in ("rollouts.jsonl", "sft/checkpoints/step-*"):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for(tmp_path, pattern, process)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
    run(tmp_path)
    for name in ("rollouts.jsonl", "kept.jsonl", "remaining.jsonl"):
        assert sorted((tmp_path / name).read_bytes().splitlines()) == sorted(
            (finished / name).read_bytes().splitlines()
        )
    expected, found = (load_model(str(folder / "model")).model.state_dict() for folder in (finished, tmp_path))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _wait_for(folder: Path, pattern: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while not any(folder.glob(pattern)):
        # It may have been quick enough to finish, which is as good.
        if process.poll() is not None:
            assert process.returncode == 0, pattern
            return
        assert time.monotonic() < deadline, pattern
        time.sleep(0.02)


def test_the_student_knows_that_a_response_ends_as_the_teachers_do(tmp_path: Path) -> None:
    """A teacher that ends on another id than the student's own EOS."""
    loaded = load_model(str(MODELS / "student-base"))
    assert loaded.eos_token_ids == (2,)
    example = SftExample(name="0.0", prompt_token_ids=(5,), response_token_ids=(6, 9))
    selection = Selection(examples=(example,), kept=(), dropped=(), shares_vocabulary=True)
    save_model(loaded, selection, tmp_path / "model")
    assert load_model(str(tmp_path / "model")).eos_token_ids == (2, 9)


def test_with_another_vocabulary_the_text_is_tokenized_anew(tmp_path: Path) -> None:
    """A student whose tokenizer has one token more."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "student-base")
    tokenizer.add_tokens(["<extra>"])
    folder = tmp_path / "student"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_bytes((MODELS / "student-base/config.json").read_bytes())
    chosen = settings(tmp_path / "run", f"student.model={folder}")
    builder = ExampleBuilder(chosen)
    assert not builder.shares_vocabulary
    problem = PromptProblem(
        index=0, messages=({"role": "user", "content": "x"},), question="x", template="dapo", answer="7", source="s",
        level="",
    )  # fmt: skip
    prompt = tokenize_problems([problem], PromptView(tokenizer=tokenizer), max_prompt_tokens=99)[0]
    rollout = TeacherRollout(prompt=0, sample=0, token_ids=[5, 6, 2], text="Answer: 7", is_truncated=False)
    example = builder.build(prompt, rollout)
    assert tokenizer.decode(example.response_token_ids[:-1]) == "Answer: 7"
    assert example.response_token_ids[-1] == tokenizer.eos_token_id
    assert example.prompt_token_ids == tuple(prompt.prompt_token_ids.tolist())
    fits = example.num_tokens
    for max_tokens, num_kept in ((fits, 1), (fits - 1, 0)):
        assert len(select(chosen, [prompt], [rollout], max_tokens=max_tokens).kept) == num_kept
