"""Evaluation while training: on the student in memory, as metrics and as files of the run."""

import json
from pathlib import Path

import pytest

from opd.errors import ConfigError
from opd.settings import load_settings
from opd.vocabulary import describe_vocabulary
from services.trainer.config import TrainSettings
from services.trainer.evaluator import Evaluator
from services.trainer.models import LoadedModel
from services.trainer.rollout.transformers_engine import TransformersEngine
from services.trainer.run_log import RunLog
from tests.unit.trainer.tiny_training import EOS, NUM_IDS, tiny_model, tiny_tokenizer


def write_problems(path: Path, answer: str | None = "7", num_words: int = 2) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"prompt": "w3 " * num_words, "reward_model": {"ground_truth": answer}}
    path.write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
    return str(path)


def evaluator(run_dir: Path, *files: str) -> Evaluator:
    model, tokenizer = tiny_model(1), tiny_tokenizer()
    settings = load_settings(
        TrainSettings, None,
        ["student.model=tiny", 'data.files=["x.jsonl"]', f"evaluation.files={json.dumps(files)}",
         "evaluation.template=boxed", "evaluation.num_samples=2", "evaluation.max_response_tokens=6"],
    )  # fmt: skip
    loaded = LoadedModel(
        name="tiny", model=model, tokenizer=tokenizer, eos_token_ids=(EOS,), fingerprint="f",
        vocabulary=describe_vocabulary(tokenizer),
    )  # fmt: skip
    engine = TransformersEngine(model, eos_token_ids=(EOS,), num_defined_ids=NUM_IDS, score_top_k=None)
    # Every response of this model is right: what is tried here is what is made of that.
    return Evaluator(settings, loaded, engine=engine, decode=lambda token_ids: "\\boxed{7}", log=RunLog(run_dir))


def test_a_prompt_that_fills_the_context_is_refused_before_the_first_step(tmp_path: Path) -> None:
    max_context = int(tiny_model(1).config.max_position_embeddings)
    file = write_problems(tmp_path / "long.jsonl", num_words=max_context)
    with pytest.raises(ConfigError, match=rf"row 0 of .*long.jsonl has \d+ prompt tokens, .* context is {max_context}"):
        evaluator(tmp_path, file)


def test_each_file_is_a_metric_and_a_file_of_the_run(tmp_path: Path) -> None:
    files = [write_problems(tmp_path / "sums.jsonl"), write_problems(tmp_path / "others.jsonl", "8")]
    (tmp_path / "run").mkdir()
    found = evaluator(tmp_path / "run", *files).evaluate(12)
    assert found == {"accuracy/sums": 1.0, "accuracy/others": 0.0}
    (kept,) = (tmp_path / "run").rglob("step-000012-sums.json")
    assert json.loads(kept.read_text(encoding="utf-8"))["total"]["solve_all"]["value"] == 1.0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/sums.jsonl", "b/sums.jsonl"], "evaluation.files: sums is the name of several"),
        (["bad.jsonl"], "evaluation.files: row 0 of .* has no answer"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_first_step(
    files: list[str], message: str, tmp_path: Path
) -> None:
    written = [write_problems(tmp_path / name, None if name == "bad.jsonl" else "7") for name in files]
    with pytest.raises(ConfigError, match=message):
        evaluator(tmp_path, *written)
