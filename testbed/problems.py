"""Arithmetic problems of five difficulty levels and their train / held-out split.

A problem is a start number followed by additions and subtractions of two-digit numbers. Its canonical text (for
example ``47+38-12``) decides the split by hash, so the two splits cannot overlap whatever seed draws them. Every
running total stays within TOTAL_MIN..TOTAL_MAX.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from random import Random

TOTAL_MIN = 15
TOTAL_MAX = 289
START_MAX = 69
HELD_OUT_PARTS = 1
SPLIT_PARTS = 8
LEVELS = ("1", "2", "3", "4")
LONG = "long"


class Split(StrEnum):
    """Where a problem belongs; decided by its canonical text alone."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """How many steps a level has, how often a step adds, and how often it needs a carry or a borrow."""

    min_steps: int
    max_steps: int
    add_share: float
    carry_share: float


LEVEL_SHAPES: dict[str, Level] = {
    "1": Level(min_steps=1, max_steps=1, add_share=0.9, carry_share=0.95),
    "2": Level(min_steps=2, max_steps=2, add_share=0.9, carry_share=0.95),
    "3": Level(min_steps=3, max_steps=3, add_share=0.9, carry_share=0.95),
    "4": Level(min_steps=4, max_steps=4, add_share=0.9, carry_share=0.95),
    # Long chains carry seldom, or no chain would survive the fault and the level would measure nothing.
    LONG: Level(min_steps=20, max_steps=28, add_share=0.5, carry_share=0.1),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A start number and signed operands; Problem(start=47, operands=(38, -12)) is 47+38-12."""

    level: str
    start: int
    operands: tuple[int, ...]

    @property
    def canonical(self) -> str:
        return str(self.start) + "".join(f"{operand:+d}" for operand in self.operands)

    @property
    def answer(self) -> int:
        return self.start + sum(self.operands)

    @property
    def split(self) -> Split:
        return split_of(self.canonical)


def split_of(canonical: str) -> Split:
    """Split by hash of the canonical text: the same problem always lands on the same side."""
    digest = hashlib.sha256(canonical.encode("ascii")).digest()
    part = int.from_bytes(digest[:8], "big") % SPLIT_PARTS
    return Split.HELD_OUT if part < HELD_OUT_PARTS else Split.TRAIN


def is_carry(total: int, operand: int) -> bool:
    """True where adding the ones digits passes ten, or subtracting them needs a borrow."""
    ones = total % 10
    return ones + operand % 10 >= 10 if operand > 0 else ones < -operand % 10


@cache
def _operands(total: int, is_sum: bool, carry: bool) -> tuple[int, ...]:
    """Two-digit operands without a zero digit that keep the total in range, with or without a carry."""
    sign = 1 if is_sum else -1
    return tuple(
        sign * size
        for size in range(11, 100)
        if size % 10 and TOTAL_MIN <= total + sign * size <= TOTAL_MAX and is_carry(total, sign * size) == carry
    )


def _draw_operand(random: Random, total: int, shape: Level) -> int:
    is_sum = random.random() < shape.add_share
    carry = random.random() < shape.carry_share
    # A sum cannot carry from a ones digit 0, and near the ends of the range only one sign is left.
    wishes = ((is_sum, carry), (not is_sum, carry), (is_sum, not carry), (not is_sum, not carry))
    return random.choice(next(filter(None, (_operands(total, *wish) for wish in wishes))))


def draw_problem(random: Random, level: str, split: Split) -> Problem:
    """Draw problems of a level until one belongs to the split."""
    shape = LEVEL_SHAPES[level]
    while True:
        start = total = random.randint(TOTAL_MIN, START_MAX)
        operands: list[int] = []
        for _ in range(random.randint(shape.min_steps, shape.max_steps)):
            operands.append(_draw_operand(random, total, shape))
            total += operands[-1]
        problem = Problem(level=level, start=start, operands=tuple(operands))
        if problem.split is split:
            return problem


def _spoken(problem: Problem) -> str:
    words = [f"add {operand}" if operand > 0 else f"take {-operand}" for operand in problem.operands]
    return ", ".join(words)


QUESTION_FORMS: tuple[Callable[[Problem], str], ...] = (
    lambda problem: f"What is {problem.canonical}?",
    lambda problem: f"Find {problem.canonical}.",
    lambda problem: f"{problem.canonical} = ?",
    lambda problem: f"Work out {problem.canonical}.",
    lambda problem: f"Start at {problem.start}, {_spoken(problem)}. What is it?",
    lambda problem: f"From {problem.start}: {_spoken(problem)}.",
)


def word_question(random: Random, problem: Problem) -> str:
    """Put a problem into words; long problems use the short forms so that the prompt stays short."""
    forms = QUESTION_FORMS[:4] if problem.level == LONG else QUESTION_FORMS
    return random.choice(forms)(problem)
