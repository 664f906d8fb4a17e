"""Expert iteration: post-training a model on verified answers of its own sampling.

A round samples train problems, keeps responses whose answer is right and fine-tunes on them. Harder levels get more
samples, and every level is cut to the same number of kept responses, so that hard problems are not starved. Few passes
at a modest rate keep the variety of wording alive. A round leaves its kept responses as JSONL beside its checkpoint.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from opd.files import whole_file
from services.trainer.rollout.base import SamplingParams
from testbed.batches import Batch, Example, Position, encode, epoch
from testbed.datasets import Item
from testbed.demonstrations import TEMPLATE_NAMES
from testbed.measuring import LONG_MAX_TOKENS, grade_samples
from testbed.problems import LEVELS, LONG, Split, draw_problem, word_question


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """How much to sample and keep; samples is by level, kept_per_level holds for levels 1-4 alike."""

    rounds: int = 3
    samples: tuple[tuple[str, int], ...] = (("1", 512), ("2", 768), ("3", 1024), ("4", 1280), (LONG, 48))
    kept_per_level: int = 384
    epochs: int = 3
    learning_rate: float = 8e-4
    max_tokens: int = 4096
    max_response_tokens: int = 192
    max_long_tokens: int = LONG_MAX_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A verified response and the prompt it answers."""

    level: str
    prompt: str
    response: str


def draw_items(random: Random, level: str, count: int) -> list[Item]:
    """Fresh train problems of a level."""
    problems = [draw_problem(random, level, Split.TRAIN) for _ in range(count)]
    return [
        Item(question=word_question(random, problem), answer=str(problem.answer), level=level) for problem in problems
    ]


def collect(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rounds: Rounds, seed: str
) -> tuple[list[Kept], dict[str, float]]:
    """Sample, grade and balance one round; also the accuracy by level that was seen."""
    random = Random(f"{seed}/collect")
    kept, accuracy = [], {}
    for level, count in rounds.samples:
        limit = rounds.max_long_tokens if level == LONG else rounds.max_response_tokens
        half = draw_items(random, level, count // 2), draw_items(random, level, count - count // 2)
        graded = [
            one
            for items, template in zip(half, TEMPLATE_NAMES, strict=True)
            for one in grade_samples(model, tokenizer, items, [template], _sampling(random, limit), 1)
        ]
        right = [
            Kept(level=level, prompt=one.item.prompt(one.template), response=one.response.text)
            for one in graded
            if one.is_correct
        ]
        accuracy[level] = round(len(right) / len(graded), 4)
        random.shuffle(right)
        kept += right[: rounds.kept_per_level]
    return kept, accuracy


def _sampling(random: Random, max_tokens: int) -> SamplingParams:
    return SamplingParams(max_response_tokens=max_tokens, seed=random.getrandbits(32))


def write_kept(path: Path, kept: list[Kept]) -> None:
    lines = [json.dumps({"level": one.level, "prompt": one.prompt, "response": one.response}) for one in kept]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_kept(path: Path) -> list[Kept]:
    return [Kept(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def kept_batches(examples: list[Example], pad: int, max_tokens: int, seed: str, start: Position) -> Iterator[Batch]:
    """Endless passes over the kept responses in a new order each, from a position on; a chunk is a pass."""
    chunk, offset = start.chunk, start.offset
    while True:
        yield from epoch(examples, pad, max_tokens, seed, chunk, offset)
        chunk, offset = chunk + 1, 0


def encode_kept(tokenizer: PreTrainedTokenizerFast, kept: list[Kept]) -> list[Example]:
    return encode(tokenizer, ((one.prompt, [one.response]) for one in kept))


def level_counts(kept: list[Kept]) -> dict[str, int]:
    """How many responses of each level were kept."""
    counts: dict[str, int] = defaultdict(int)
    for one in kept:
        counts[one.level] += 1
    return {level: counts[level] for level in (*LEVELS, LONG)}
