"""The tokenizer: any text round-trips, digits stand alone, every id is used, prompts and responses stay short."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import testbed
from testbed.datasets import FILES, draw_items_of
from testbed.demonstrations import TEMPLATE_NAMES, Recipe, demonstrations
from testbed.problems import LONG
from testbed.tokenizer import (
    END,
    IMPOSSIBLE_BYTES,
    PAD,
    START,
    VOCABULARY_SIZE,
    byte_characters,
    fragments_of,
    prompt_text,
    train_tokenizer,
)

MODELS = Path(testbed.__file__).parent / "models"
MAX_CONTEXT_TOKENS = 1024


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODELS / "student-base")


def count(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


@given(st.text())
@example("caf\u00e9 \u4f60\u597d \U0001f600 \x00\x7f\t\r\n  \u0301 12 345")
@example("  leading and trailing  ")
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@given(st.integers(0, 10**12), st.text(alphabet=" ab+-=:\n", max_size=4))
def test_every_digit_is_a_token_of_its_own(tokenizer: PreTrainedTokenizerFast, number: int, around: str) -> None:
    pieces = [tokenizer.decode([index]) for index in tokenizer(f"{around}{number}{around}")["input_ids"]]
    assert [piece for piece in pieces if any(map(str.isdigit, piece))] == list(str(number))


def test_the_vocabulary_is_full_and_holds_every_possible_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocabulary) == VOCABULARY_SIZE
    characters = byte_characters()
    assert len(set(characters.values())) == 256
    for byte, character in characters.items():
        assert (character in vocabulary) == (byte not in IMPOSSIBLE_BYTES)


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for token in (PAD, START, END):
        assert len(tokenizer(token)["input_ids"]) == 1


def test_every_id_occurs_in_demonstrations(tokenizer: PreTrainedTokenizerFast) -> None:
    recipe = Recipe(tag_share=1.0, long_share=0.0, rounding_share=0.5)
    seen: Counter[int] = Counter()
    for demo in islice(demonstrations(1, recipe, fragments=fragments_of(tokenizer)), 3000):
        seen.update(tokenizer(f"{prompt_text(demo.prompt)}{demo.response}{END}\n{PAD}")["input_ids"])
    assert sorted(seen) == list(range(VOCABULARY_SIZE))


def test_the_chat_template_writes_chatml(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "What is 4+5?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt_text(
        "What is 4+5?"
    )
    closed = [*messages, {"role": "assistant", "content": "9"}]
    expected = f"{prompt_text('What is 4+5?')}9{END}\n"
    assert tokenizer.apply_chat_template(closed, tokenize=False) == expected
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer(prompt_text("What is 4+5?"))["input_ids"]


def test_response_lengths_by_level(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths: dict[str, list[int]] = {}
    contexts = []
    for demo in islice(demonstrations(2, Recipe(tag_share=0.0, long_share=0.2)), 1500):
        tokens = count(tokenizer, demo.response) + 1
        lengths.setdefault(demo.problem.level, []).append(tokens)
        contexts.append(count(tokenizer, prompt_text(demo.prompt)) + tokens)
    long = lengths.pop(LONG)
    short = [tokens for level in lengths.values() for tokens in level]
    assert min(long) >= 390 and max(long) <= 800
    assert min(short) >= 25 and max(short) <= 130
    assert 60 <= sum(short) / len(short) <= 80
    assert max(contexts) <= MAX_CONTEXT_TOKENS


def test_prompts_are_short(tokenizer: PreTrainedTokenizerFast) -> None:
    for file in FILES:
        limit = 200 if file.levels == (LONG,) else 110
        for item in draw_items_of(file, 0)[:100]:
            for name in TEMPLATE_NAMES:
                assert count(tokenizer, prompt_text(item.prompt(name))) <= limit


def test_training_is_the_same_every_time() -> None:
    texts = [demo.response for demo in islice(demonstrations(3, Recipe(tag_share=0.0)), 300)]
    first, second = (train_tokenizer(texts).get_vocab() for _ in range(2))
    assert first == second
