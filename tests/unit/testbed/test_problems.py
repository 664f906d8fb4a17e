"""Problems: ranges, steps, carries, and splits that cannot overlap."""

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.problems import (
    LEVEL_SHAPES,
    LEVELS,
    LONG,
    QUESTION_FORMS,
    TOTAL_MAX,
    TOTAL_MIN,
    Problem,
    Split,
    draw_problem,
    is_carry,
    split_of,
    word_question,
)


def totals(problem: Problem) -> list[int]:
    reached = [problem.start]
    for operand in problem.operands:
        reached.append(reached[-1] + operand)
    return reached


@pytest.mark.parametrize("level", [*LEVELS, LONG])
def test_problems_keep_the_bounds_of_their_level(level: str) -> None:
    random = Random(1)
    shape = LEVEL_SHAPES[level]
    for _ in range(200):
        problem = draw_problem(random, level, Split.TRAIN)
        assert shape.min_steps <= len(problem.operands) <= shape.max_steps
        assert all(TOTAL_MIN <= total <= TOTAL_MAX for total in totals(problem))
        assert all(11 <= abs(operand) <= 99 and operand % 10 for operand in problem.operands)


@pytest.mark.parametrize("level", [*LEVELS, LONG])
def test_the_answer_is_what_the_canonical_text_evaluates_to(level: str) -> None:
    random = Random(2)
    for _ in range(100):
        problem = draw_problem(random, level, Split.HELD_OUT)
        terms = re.findall(r"[+-]?\d+", problem.canonical)
        assert "".join(terms) == problem.canonical
        assert sum(int(term) for term in terms) == problem.answer == totals(problem)[-1]


@pytest.mark.parametrize("level", [*LEVELS, LONG])
def test_no_problem_is_in_both_splits(level: str) -> None:
    random = Random(3)
    train = {draw_problem(random, level, Split.TRAIN).canonical for _ in range(1500)}
    held_out = {draw_problem(random, level, Split.HELD_OUT).canonical for _ in range(300)}
    assert not train & held_out
    assert {split_of(canonical) for canonical in train} == {Split.TRAIN}
    assert {split_of(canonical) for canonical in held_out} == {Split.HELD_OUT}


def test_the_held_out_share_is_an_eighth() -> None:
    sides = [split_of(f"{start}+{operand}") for start in range(15, 70) for operand in range(11, 100)]
    assert 0.10 < sides.count(Split.HELD_OUT) / len(sides) < 0.15


@given(st.integers(0, 999), st.integers(11, 99), st.booleans())
def test_a_carry_changes_the_tens_beyond_the_tens_digits(total: int, size: int, is_sum: bool) -> None:
    operand = size if is_sum else -size
    without = total // 10 + (size // 10 if is_sum else -(size // 10))
    assert is_carry(total, operand) == ((total + operand) // 10 != without)


def test_carries_are_common_in_levels_and_rare_in_long_problems() -> None:
    random = Random(4)

    def carry_share(level: str) -> float:
        drawn = [draw_problem(random, level, Split.TRAIN) for _ in range(200)]
        steps = [pair for problem in drawn for pair in zip(totals(problem), problem.operands, strict=False)]
        return sum(is_carry(*step) for step in steps) / len(steps)

    assert min(carry_share(level) for level in LEVELS) > 0.85
    assert carry_share(LONG) < 0.2


def test_the_same_seed_draws_the_same_problems() -> None:
    first, second = Random(5), Random(5)
    for level in [*LEVELS, LONG] * 3:
        one, other = (draw_problem(random, level, Split.TRAIN) for random in (first, second))
        assert one == other
        assert word_question(first, one) == word_question(second, other)


def test_questions_state_every_number_in_several_wordings() -> None:
    problem = Problem(level="2", start=47, operands=(38, -12))
    worded = {form(problem) for form in QUESTION_FORMS}
    assert len(worded) == len(QUESTION_FORMS) >= 5
    for question in worded:
        assert [int(number) for number in re.findall(r"\d+", question)] == [47, 38, 12]
