"""Problem files in the form of the paper's data sets, and reading them back.

One JSON object a line: prompt messages, the ground truth, the source and what is needed to render the question in
another template. Questions are unique within a file, and the split of a problem decides which file may hold it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from services.trainer.templates import TEMPLATES
from testbed.problems import LEVELS, LONG, Problem, Split, draw_problem, word_question

DATA_FOLDER = Path(__file__).parent / "data"
DEFAULT_TEMPLATE = "dapo"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemFile:
    """Which problems to draw, levels taking turns, and the files they are spread over in equal parts."""

    names: tuple[str, ...]
    split: Split
    levels: tuple[str, ...]
    size: int


# Two files, because no file of the repository may pass 500 kB.
TRAIN_NAMES = ("train.jsonl", "train_2.jsonl")
FILES = (
    ProblemFile(names=TRAIN_NAMES, split=Split.TRAIN, levels=LEVELS, size=2048),
    ProblemFile(names=("heldout.jsonl",), split=Split.HELD_OUT, levels=LEVELS, size=256),
    ProblemFile(names=("train_long.jsonl",), split=Split.TRAIN, levels=(LONG,), size=256),
    ProblemFile(names=("heldout_long.jsonl",), split=Split.HELD_OUT, levels=(LONG,), size=64),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A problem as a file holds it; question is bare, so any template can render it."""

    question: str
    answer: str
    level: str

    def prompt(self, template: str) -> str:
        return TEMPLATES[template].render(self.question)


def draw_unique(random: Random, file: ProblemFile) -> list[tuple[Problem, str]]:
    """Problems with their questions, no problem twice."""
    drawn: dict[str, tuple[Problem, str]] = {}
    while len(drawn) < file.size:
        problem = draw_problem(random, file.levels[len(drawn) % len(file.levels)], file.split)
        drawn.setdefault(problem.canonical, (problem, word_question(random, problem)))
    return list(drawn.values())


def draw_items_of(file: ProblemFile, seed: int) -> list[Item]:
    """The items a file holds, without reading it."""
    return [
        Item(question=question, answer=str(problem.answer), level=problem.level)
        for problem, question in _drawn(file, seed)
    ]


def _drawn(file: ProblemFile, seed: int) -> list[tuple[Problem, str]]:
    return draw_unique(Random(f"{file.names[0]}/{seed}"), file)


def _record(index: int, problem: Problem, question: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": TEMPLATES[DEFAULT_TEMPLATE].render(question)}],
        "reward_model": {"ground_truth": str(problem.answer)},
        "data_source": f"testbed/level{problem.level}" if problem.level in LEVELS else f"testbed/{problem.level}",
        "extra_info": {
            "index": index,
            "level": problem.level,
            "template": DEFAULT_TEMPLATE,
            "question": question,
        },
    }


def write_files(folder: Path, seed: int) -> None:
    """Write all problem files; the same seed writes the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        problems = _drawn(file, seed)
        lines = [json.dumps(_record(index, *pair), separators=(",", ":")) for index, pair in enumerate(problems)]
        size = len(lines) // len(file.names)
        for part, name in enumerate(file.names):
            text = "\n".join(lines[part * size : (part + 1) * size]) + "\n"
            (folder / name).write_text(text, encoding="utf-8")


def read_items(path: Path) -> list[Item]:
    """Read a problem file."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Item(
            question=record["extra_info"]["question"],
            answer=record["reward_model"]["ground_truth"],
            level=record["extra_info"]["level"],
        )
        for record in records
    ]
