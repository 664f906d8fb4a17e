"""Demonstrations: a prompt, a solution and what is known about it, drawn endlessly from a seed.

A demonstration belongs to one split of the problems, uses both prompt templates equally and mixes levels and styles by
its recipe. ``forget_rate`` 0 gives correct demonstrations only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from services.trainer.templates import TEMPLATES
from testbed.problems import LEVELS, LONG, Problem, Split, draw_problem, word_question
from testbed.solutions import FORGET_RATE, STYLES, Solution, solve
from testbed.tags import TAG_SHARE, draw_tag

LONG_SHARE = 0.05
TEMPLATE_NAMES = ("dapo", "boxed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The mixture demonstrations are drawn from."""

    forget_rate: float = FORGET_RATE
    rounding_share: float = 0.02
    long_share: float = LONG_SHARE
    tag_share: float = TAG_SHARE


IMPERFECT = Recipe()
OTHER_STYLE = Recipe(forget_rate=0.0, rounding_share=0.9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """One worked example; prompt is the user message and response ends before the end-of-turn token."""

    problem: Problem
    template: str
    prompt: str
    response: str
    solution: Solution


def demonstrate(
    random: Random, recipe: Recipe, split: Split, fragments: tuple[str, ...] = (), num_solutions: int = 1
) -> list[Demonstration]:
    """Draw a problem and solutions of it, all for the same prompt; fragments are token texts for its tag."""
    level = LONG if random.random() < recipe.long_share else random.choice(LEVELS)
    problem = draw_problem(random, level, split)
    template = random.choice(TEMPLATE_NAMES)
    tag = draw_tag(random, fragments) if random.random() < recipe.tag_share else ""
    prompt = TEMPLATES[template].render(tag + word_question(random, problem))
    # One solution fills a long context, so long problems get no second one.
    solutions = [
        solve(random, problem, template, STYLES[random.random() < recipe.rounding_share], recipe.forget_rate)
        for _ in range(1 if level == LONG else num_solutions)
    ]
    return [
        Demonstration(problem=problem, template=template, prompt=prompt, response=tag + one.text, solution=one)
        for one in solutions
    ]


def grouped_demonstrations(
    seed: int | str,
    recipe: Recipe,
    split: Split = Split.TRAIN,
    fragments: tuple[str, ...] = (),
    num_solutions: int = 1,
) -> Iterator[list[Demonstration]]:
    """An endless stream of problems with their solutions; the same seed gives the same stream."""
    random = Random(f"{split}/{seed}")
    while True:
        yield demonstrate(random, recipe, split, fragments, num_solutions)


def demonstrations(
    seed: int | str, recipe: Recipe, split: Split = Split.TRAIN, fragments: tuple[str, ...] = ()
) -> Iterator[Demonstration]:
    """The same with one solution a problem."""
    return (group[0] for group in grouped_demonstrations(seed, recipe, split, fragments))
