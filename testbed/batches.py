"""Token batches from demonstrations: an endless, seeded stream that can start again anywhere.

A chunk of demonstrations is drawn, sorted by length and cut into batches of about equal token counts, so padding is
small; the order of batches is then shuffled. A position (chunk, offset) names the next batch, which is all that a
checkpoint has to remember. Only response tokens are trained on. An example may hold several responses to its prompt:
each of them sees the prompt and itself, at the positions it would have alone, so the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from testbed.demonstrations import Demonstration, Recipe, grouped_demonstrations
from testbed.problems import Split
from testbed.tokenizer import END, PAD, fragments_of, prompt_text

CHUNK_PROBLEMS = 256
NUM_SOLUTIONS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """The next batch: offset within the shuffled batches of a chunk."""

    chunk: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """Token ids of a prompt and of the responses to it."""

    prompt: list[int]
    responses: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Right-padded examples; sources_N and targets_N are flat positions, a source predicts its target.

    mask_B1TT says which position (second T) a position (first T) sees; after is the position of the next batch.
    """

    ids_BT: Tensor
    positions_BT: Tensor
    mask_B1TT: Tensor
    sources_N: Tensor
    targets_N: Tensor
    after: Position


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Iterable[tuple[str, list[str]]]) -> list[Example]:
    """Encode prompts with their responses; a document ends as chat documents do, with a line end and the pad token."""
    pairs = list(pairs)
    prompts = tokenizer([prompt_text(prompt) for prompt, _ in pairs])["input_ids"]
    endings = [f"{response}{END}\n{PAD}" for _, responses in pairs for response in responses]
    encoded = iter(tokenizer(endings)["input_ids"])
    return [
        Example(prompt=prompt, responses=[next(encoded) for _ in responses])
        for prompt, (_, responses) in zip(prompts, pairs, strict=True)
    ]


def encode_demonstrations(tokenizer: PreTrainedTokenizerFast, groups: Iterable[list[Demonstration]]) -> list[Example]:
    """Encode groups of demonstrations that share their prompt."""
    return encode(tokenizer, ((group[0].prompt, [demo.response for demo in group]) for group in groups))


def _layout(example: Example) -> tuple[list[int], list[int], list[int], list[int]]:
    """Segment (0 is the prompt) and position of every token, and which token predicts which."""
    size = len(example.prompt)
    segments, positions = [0] * size, list(range(size))
    sources: list[int] = []
    for segment, response in enumerate(example.responses, start=1):
        start = len(segments)
        sources += [size - 1, *range(start, start + len(response) - 1)]
        segments += [segment] * len(response)
        positions += range(size, size + len(response))
    return segments, positions, sources, list(range(size, len(segments)))


def collate(examples: list[Example], pad: int, after: Position) -> Batch:
    """Pad on the right; padding sees the prompt and itself, so that no row of the mask is empty."""
    width = max(example.num_tokens for example in examples)
    ids_BT = torch.full((len(examples), width), pad)
    segments_BT = torch.full((len(examples), width), -1)
    positions_BT = torch.zeros(len(examples), width, dtype=torch.long)
    sources: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(examples):
        segments, positions, row_sources, row_targets = _layout(example)
        ids_BT[row, : len(segments)] = torch.tensor([*example.prompt, *chain(*example.responses)])
        segments_BT[row, : len(segments)] = torch.tensor(segments)
        positions_BT[row, : len(segments)] = torch.tensor(positions)
        sources += [row * width + source for source in row_sources]
        targets += [row * width + target for target in row_targets]
    seen_BTT = (segments_BT[:, None, :] == 0) | (segments_BT[:, None, :] == segments_BT[:, :, None])
    return Batch(
        ids_BT=ids_BT,
        positions_BT=positions_BT,
        mask_B1TT=(seen_BTT & torch.ones(width, width, dtype=torch.bool).tril())[:, None],
        sources_N=torch.tensor(sources),
        targets_N=torch.tensor(targets),
        after=after,
    )


def cut(examples: list[Example], max_tokens: int) -> list[list[Example]]:
    """Sort by length and cut so that every batch, padding included, holds at most max_tokens (or one example)."""
    groups: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: example.num_tokens):
        if groups and example.num_tokens * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def epoch(
    examples: list[Example], pad: int, max_tokens: int, seed: str, chunk: int = 0, offset: int = 0
) -> Iterator[Batch]:
    """The batches of the examples in shuffled order, from an offset on."""
    random = Random(f"{seed}/{chunk}/order")
    groups = cut(random.sample(examples, len(examples)), max_tokens)
    random.shuffle(groups)
    for place, group in enumerate(groups[offset:], start=offset):
        yield collate(group, pad, Position(chunk=chunk, offset=place + 1))


def demonstration_batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: str, max_tokens: int, start: Position
) -> Iterator[Batch]:
    """Endless batches of fresh training demonstrations from a position on."""
    fragments = fragments_of(tokenizer)
    chunk, offset = start.chunk, start.offset
    while True:
        groups = grouped_demonstrations(f"{seed}/{chunk}", recipe, Split.TRAIN, fragments, NUM_SOLUTIONS)
        examples = encode_demonstrations(tokenizer, islice(groups, CHUNK_PROBLEMS))
        yield from epoch(examples, tokenizer.pad_token_id, max_tokens, seed, chunk, offset)
        chunk, offset = chunk + 1, 0
