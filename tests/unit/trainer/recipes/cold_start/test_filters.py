"""Filters: each catches what it is for, and sound responses pass all of them."""

import numpy as np
import pytest

from services.trainer.recipes.cold_start.config import FilterSettings
from services.trainer.recipes.cold_start.filters import (
    DropReason,
    find_fault,
    has_repeated_block,
    is_unfinished,
    repeated_line_share,
    repeated_ngram_share,
)

SOUND = "First add 3 and 4.\nThat is 7.\nAnswer: 7"
DEFAULTS = FilterSettings()


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


def fault(text: str, *, is_truncated: bool = False, answer: str | None = "7", **changes: object) -> DropReason | None:
    settings = DEFAULTS.model_copy(update=changes)
    return find_fault(ids(text), text, is_truncated=is_truncated, template="dapo", answer=answer, settings=settings)


def test_a_sound_response_passes() -> None:
    assert fault(SOUND, require_correct=True) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", DropReason.UNFINISHED),
        ("<think>so Answer: 7", DropReason.UNFINISHED),
        ("```python\nx = 1\nAnswer: 7", DropReason.UNFINISHED),
        ("it is \\boxed{\\frac{1}{2} Answer: 7", DropReason.UNFINISHED),
        ("Wait, no.\nBut then yes.\n" * 6 + "Answer: 7", DropReason.REPEATED_LINES),
        ("so we go on and on and over; " * 9 + "Answer: 7", DropReason.REPEATED_NGRAMS),
        ("It is 7.", DropReason.NO_ANSWER),
        ("It is \\boxed{7}.", DropReason.NO_ANSWER),
    ],
)
def test_a_faulty_response_is_dropped_for_its_reason(text: str, reason: DropReason) -> None:
    assert fault(text) is reason


def test_what_was_cut_off_is_truncated_whatever_else_it_is() -> None:
    assert fault("Wait.\n" * 20, is_truncated=True) is DropReason.TRUNCATED


def test_a_block_that_repeats_within_a_varied_response_is_found() -> None:
    varied = np.random.default_rng(0).integers(0, 5000, size=400).tolist()
    loop = list(range(9000, 9020)) * 4
    response = [*varied[:200], *loop, *varied[200:]]
    assert repeated_ngram_share(response, DEFAULTS.ngram) < 0.5
    assert has_repeated_block(response, 512, 4)
    assert not has_repeated_block(response, 512, 5)
    assert not has_repeated_block(response, 19, 4)
    assert not has_repeated_block(varied, 512, 2)


@pytest.mark.parametrize("seed", range(6))
def test_repeated_blocks_are_those_a_plain_search_finds(seed: int) -> None:
    generator = np.random.default_rng(seed)
    block = generator.integers(0, 3, size=generator.integers(1, 25)).tolist()
    response = [*generator.integers(0, 3, size=60).tolist(), *block * int(generator.integers(2, 9))]

    def by_search() -> bool:
        for period in range(1, 31):
            for start in range(len(response)):
                length = max(4 * period, 64)
                part = response[start : start + length]
                if len(part) == length and all(part[place] == part[place - period] for place in range(period, length)):
                    return True
        return False

    assert has_repeated_block(response, 30, 4) == by_search()


def test_shares_are_those_of_the_definition() -> None:
    assert repeated_line_share("a\nb\n\na\n a \nc\nd\ne\nf\n") == pytest.approx(2 / 8)
    assert repeated_line_share("a\na\na") == 0.0
    assert repeated_ngram_share([1, 2, 3, 4] * 20, 4) == pytest.approx(1 - 4 / 77)
    assert repeated_ngram_share(list(range(200)), 4) == 0.0


@pytest.mark.parametrize("text", ["done", "\\boxed{\\{1, 2\\}}", "<think>a</think> b", "```\nx\n```"])
def test_finished_texts_are_finished(text: str) -> None:
    assert not is_unfinished(text)


def test_wrong_answers_are_kept_unless_they_are_not_wanted() -> None:
    assert fault(SOUND, answer="8") is None
    assert fault(SOUND, answer="8", require_correct=True) is DropReason.WRONG_ANSWER
    assert fault(SOUND, answer=None, require_correct=True) is None
    assert fault("It is 7.", require_answer=False) is None
