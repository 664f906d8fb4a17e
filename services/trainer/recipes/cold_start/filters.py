"""Why a teacher's response is not for imitation: pure functions of its tokens and text.

The paper drops incomplete and degenerate repetitive responses (C.1) without saying how; what is meant here stands with
each function, and every threshold is a setting.
"""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from services.trainer.recipes.cold_start.config import FilterSettings
from services.trainer.templates import get_template

_MIN_LINES = 8
_MIN_NGRAMS = 64
_MIN_BLOCK_TOKENS = 64
_FENCE = "```"


class DropReason(StrEnum):
    """In the order in which they are looked for."""

    TRUNCATED = "truncated"
    """Cut off at the length limit."""
    UNFINISHED = "unfinished"
    """Ended, but is empty or left a thought, a code block or a box open."""
    REPEATED_LINES = "repeated_lines"
    REPEATED_NGRAMS = "repeated_ngrams"
    REPEATED_BLOCK = "repeated_block"
    NO_ANSWER = "no_answer"
    """No answer in the form its template asks for."""
    WRONG_ANSWER = "wrong_answer"
    TOO_LONG = "too_long"
    """Prompt and response do not fit into a row of the fine-tuning."""


def find_fault(
    token_ids: Sequence[int],
    text: str,
    *,
    is_truncated: bool,
    template: str,
    answer: str | None,
    settings: FilterSettings,
) -> DropReason | None:
    """The first reason that holds, or None. `template` is empty where none is known: then no answer is looked for."""
    if is_truncated:
        return DropReason.TRUNCATED
    if is_unfinished(text):
        return DropReason.UNFINISHED
    if repeated_line_share(text) > settings.max_repeated_line_share:
        return DropReason.REPEATED_LINES
    if repeated_ngram_share(token_ids, settings.ngram) > settings.max_repeated_ngram_share:
        return DropReason.REPEATED_NGRAMS
    if has_repeated_block(token_ids, settings.max_block_tokens, settings.min_block_repeats):
        return DropReason.REPEATED_BLOCK
    return _answer_fault(text, template, answer, settings)


def is_unfinished(text: str) -> bool:
    r"""Empty, an unclosed <think>, an odd number of ``` fences, or a \boxed{ that no brace closes."""
    if not text.strip() or text.count("<think>") > text.count("</think>") or text.count(_FENCE) % 2:
        return True
    box = text.rfind("\\boxed{")
    return box >= 0 and _is_open(text[box + len("\\boxed{") :])


def repeated_line_share(text: str) -> float:
    """Share of the non-blank lines that stood in the text before; 0 for fewer than 8 lines."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return 1.0 - len(set(lines)) / len(lines) if len(lines) >= _MIN_LINES else 0.0


def repeated_ngram_share(token_ids: Sequence[int], n: int) -> float:
    """Share of the runs of n tokens that stood in the response before; 0 for fewer than 64 runs."""
    num_ngrams = len(token_ids) - n + 1
    if num_ngrams < _MIN_NGRAMS:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(token_ids, dtype=np.int32), n)
    return 1.0 - len(Counter(window.tobytes() for window in windows)) / num_ngrams


def has_repeated_block(token_ids: Sequence[int], max_block_tokens: int, min_repeats: int) -> bool:
    """Whether a block of at most `max_block_tokens` stands `min_repeats` times in a row, 64 tokens in all or more.

    A stretch repeats with period p where every token equals the one p before it.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    for period in range(1, min(max_block_tokens, ids.size // min_repeats) + 1):
        wanted = max(period * min_repeats, _MIN_BLOCK_TOKENS) - period
        if _longest_run(ids[period:] == ids[:-period]) >= wanted:
            return True
    return False


def _longest_run(flags: NDArray[np.bool_]) -> int:
    breaks = np.flatnonzero(~np.concatenate([[False], flags, [False]]))
    return int(np.diff(breaks).max()) - 1


def _is_open(text: str) -> bool:
    depth = 1
    for index, character in enumerate(text):
        if index and text[index - 1] == "\\":
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return False
    return True


def _answer_fault(text: str, template: str, answer: str | None, settings: FilterSettings) -> DropReason | None:
    if not template or not (settings.require_answer or settings.require_correct):
        return None
    extracted = get_template(template).extract(text)
    if extracted is None:
        return DropReason.NO_ANSWER
    if settings.require_correct and answer is not None:
        from services.trainer.evaluation.grading import is_equal

        return None if is_equal(extracted, answer) else DropReason.WRONG_ANSWER
    return None
