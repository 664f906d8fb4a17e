"""Demonstrations: every equation holds, the fault is where it belongs and as frequent as stated.

The checks here read the text with patterns of their own and do the arithmetic again, so they do not lean on the
writer or on the parser.
"""

import re
from itertools import islice

import pytest

from services.trainer.evaluation.grading import grade
from testbed.demonstrations import (
    IMPERFECT,
    OTHER_STYLE,
    Demonstration,
    Recipe,
    demonstrations,
    grouped_demonstrations,
)
from testbed.parsing import read, style_of
from testbed.problems import Split

CORRECT = Recipe(forget_rate=0.0, rounding_share=0.5)
EQUATION = re.compile(r"(\d+(?:[+-]\d+)+)(?:=| is | gives )(\d+)")
MIXED = Recipe(rounding_share=0.5)


def drawn(recipe: Recipe, count: int, split: Split = Split.TRAIN) -> list[Demonstration]:
    return list(islice(demonstrations(11, recipe, split), count))


def value(expression: str) -> int:
    return sum(int(term) for term in re.findall(r"[+-]?\d+", expression))


@pytest.mark.parametrize("recipe", [IMPERFECT, OTHER_STYLE, MIXED], ids=["imperfect", "other", "mixed"])
def test_every_equation_of_every_step_holds(recipe: Recipe) -> None:
    for demo in drawn(recipe, 400):
        equations = EQUATION.findall(demo.response)
        per_step = 2 if demo.solution.style == "columns" else 1
        assert len(equations) == per_step * len(demo.problem.operands), demo.response
        assert all(value(left) == int(right) for left, right in equations), demo.response


def test_correct_demonstrations_end_in_the_right_answer_and_never_forget() -> None:
    for recipe in (CORRECT, OTHER_STYLE):
        for demo in drawn(recipe, 400):
            assert demo.solution.num_forgotten == 0
            assert demo.solution.result == demo.problem.answer
            assert grade(demo.template, demo.response, str(demo.problem.answer))


def test_the_stated_answer_is_the_chain_s_own_result() -> None:
    for demo in drawn(MIXED, 500):
        stated = re.findall(r"\d+", demo.response)[-1]
        assert int(stated) == demo.solution.result
        assert grade(demo.template, demo.response, str(demo.solution.result))


@pytest.mark.parametrize("style", ["columns", "rounding"])
def test_a_third_of_the_carry_steps_forget(style: str) -> None:
    recipe = Recipe(rounding_share=1.0 if style == "rounding" else 0.0, long_share=0.0)
    solutions = [demo.solution for demo in drawn(recipe, 2500)]
    rate = sum(one.num_forgotten for one in solutions) / sum(one.num_carries for one in solutions)
    assert 0.30 <= rate <= 0.35


def test_a_chain_is_wrong_by_its_forgotten_carries_and_nothing_else() -> None:
    for demo in drawn(Recipe(rounding_share=0.0), 500):
        gap = demo.solution.result - demo.problem.answer
        assert gap % 10 == 0
        assert abs(gap) <= 10 * demo.solution.num_forgotten
        if demo.solution.num_forgotten % 2:
            assert gap != 0


def test_a_forgotten_carry_leaves_out_the_mark_and_the_one() -> None:
    for demo in drawn(Recipe(rounding_share=0.0, long_share=0.0, tag_share=0.0), 300):
        marks = len(re.findall(r" carry| keep| hold| save| borrow| owe| due| lent|\^", demo.response))
        ones = len(re.findall(r"\d[+-]\d\d?[+-]1(?:=| is | gives )", demo.response))
        assert marks == ones == demo.solution.num_carries - demo.solution.num_forgotten


@pytest.mark.parametrize("recipe", [IMPERFECT, OTHER_STYLE, MIXED], ids=["imperfect", "other", "mixed"])
def test_the_parser_reads_back_what_was_written(recipe: Recipe) -> None:
    for demo in drawn(recipe, 400):
        reading = read(demo.response)
        assert reading.style == demo.solution.style
        assert reading.num_steps == len(demo.problem.operands)
        assert reading.num_carries == demo.solution.num_carries
        assert reading.num_forgotten == demo.solution.num_forgotten


def test_the_parser_takes_any_text() -> None:
    for text in ("", "Answer: 7", "Digits first", "Digits first\n+12: 3+", "\ufffd" * 9):
        reading = read(text)
        assert reading.num_steps == 0
    assert style_of("no style here") is None


@pytest.mark.parametrize(("recipe", "share"), [(IMPERFECT, 0.02), (OTHER_STYLE, 0.9)])
def test_style_shares_follow_the_recipe(recipe: Recipe, share: float) -> None:
    styles = [demo.solution.style for demo in drawn(recipe, 1200)]
    assert styles.count("rounding") / len(styles) == pytest.approx(share, abs=0.02)


def test_templates_are_used_equally_and_own_the_ending() -> None:
    demos = drawn(IMPERFECT, 1000)
    assert [demo.template for demo in demos].count("dapo") / len(demos) == pytest.approx(0.5, abs=0.05)
    for demo in demos:
        pattern = r"\nAnswer: \d+$" if demo.template == "dapo" else r"\\boxed\{\d+\}$"
        assert re.search(pattern, demo.response), demo.response


def test_demonstrations_stay_on_their_side_of_the_split() -> None:
    for split in Split:
        assert {demo.problem.split for demo in drawn(IMPERFECT, 300, split)} == {split}


def test_the_same_seed_writes_the_same_demonstrations() -> None:
    first, second, other = (
        [demo.response for demo in islice(demonstrations(seed, IMPERFECT), 50)] for seed in (7, 7, 8)
    )
    assert first == second != other


def test_a_group_shares_its_prompt_and_varies_its_solutions() -> None:
    recipe = Recipe(long_share=0.0, tag_share=0.0)
    groups = list(islice(grouped_demonstrations(3, recipe, num_solutions=3), 100))
    assert all(len({demo.prompt for demo in group}) == 1 for group in groups)
    assert sum(len({demo.response for demo in group}) == 3 for group in groups) > 90
