"""The bundled models: complete, small, loadable, and as their cards say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import testbed
from testbed.cards import CARD_FILE, README_FILE
from testbed.datasets import DATA_FOLDER, read_items
from testbed.demonstrations import TEMPLATE_NAMES
from testbed.measuring import TRAINING_SAMPLING, Summary, grade_samples, summarize

MODELS = Path(testbed.__file__).parent / "models"
NAMES = ("student-base", "teacher-big", "teacher-other", "teacher-post")
MAX_WEIGHT_BYTES = 4_000_000
MAX_TOTAL_BYTES = 16_000_000
NUM_PROBLEMS = 64
# About three standard errors of a share measured on NUM_PROBLEMS samples.
TOLERANCE = 0.18


def card_of(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / CARD_FILE).read_text(encoding="utf-8"))


def test_the_family_is_complete_and_nothing_else() -> None:
    assert {folder.name for folder in MODELS.iterdir() if folder.is_dir()} == set(NAMES)


def test_files_are_within_their_limits() -> None:
    for name in NAMES:
        assert (MODELS / name / "model.safetensors").stat().st_size <= MAX_WEIGHT_BYTES
        assert (MODELS / name / README_FILE).exists()
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= MAX_TOTAL_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_models_load_as_any_qwen3_does(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODELS / name)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    config = model.config
    assert config.model_type == "qwen3"
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 1024
    assert config.vocab_size == len(tokenizer) == 512
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == card_of(name)["measured"]["parameters"]
    is_small = parameters <= 1_000_000
    assert next(model.parameters()).dtype == (torch.float32 if is_small else torch.bfloat16)


def test_all_models_share_one_tokenizer() -> None:
    assert len({(MODELS / name / "tokenizer.json").read_bytes() for name in NAMES}) == 1


def measured(name: str) -> Summary:
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    items = read_items(DATA_FOLDER / "heldout.jsonl")[-NUM_PROBLEMS:]
    return summarize(grade_samples(model, tokenizer, items, TEMPLATE_NAMES, TRAINING_SAMPLING, 1))


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_as_the_card_says(name: str) -> None:
    seen, stated = measured(name), card_of(name)["measured"]["training_sampling"]
    assert seen.accuracy == pytest.approx(stated["accuracy"], abs=TOLERANCE)
    assert seen.forgotten_carry_rate == pytest.approx(stated["forgotten_carry_rate"], abs=TOLERANCE)
    assert seen.mean_entropy_nats == pytest.approx(stated["mean_entropy_nats"], abs=0.05)
    assert seen.style_shares.get("rounding", 0) == pytest.approx(stated["style_shares"].get("rounding", 0), abs=0.1)
    assert seen.max_live_tokens >= 8


def test_the_cards_tell_the_story_of_the_family() -> None:
    stated = {name: card_of(name)["measured"]["training_sampling"] for name in NAMES}
    base, post = stated["student-base"], stated["teacher-post"]
    assert 0.25 <= base["accuracy"] <= 0.5
    assert 0.25 <= base["forgotten_carry_rate"] <= 0.4
    assert abs(stated["teacher-big"]["accuracy"] - base["accuracy"]) <= 0.1
    assert post["accuracy"] >= base["accuracy"] + 0.25
    assert stated["teacher-other"]["accuracy"] >= post["accuracy"] - 0.02
    assert stated["teacher-other"]["style_shares"]["rounding"] >= 0.8
    assert all(stated[name]["style_shares"]["columns"] >= 0.9 for name in NAMES if name != "teacher-other")
    assert all(0.2 <= one["mean_entropy_nats"] <= 0.5 for one in stated.values())
