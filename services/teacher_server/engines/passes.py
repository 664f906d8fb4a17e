"""Which requests share a forward pass: rectangles of similar lengths, and siblings that continue one prompt.

A rectangle is as wide as its longest sequence; what the shorter ones leave empty is padding, which costs as much as
real tokens. Both the area of a rectangle and the share of padding in it are bounded. Siblings are requests with the
same prompt: it is computed once (or was, before) and only their responses remain, where that saves enough tokens to pay
for passes of their own. On a CPU several passes may run at the same time; there are then more and smaller ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd.types import ScoreRequest
from services.teacher_server.engines.prefix_cache import prompt_key


@dataclass(frozen=True, kw_only=True, slots=True)
class PassLimits:
    """Bounds of one forward pass."""

    max_tokens: int
    """Padding included; a longer single request has a pass of its own."""
    max_padding_share: float
    min_saved_tokens: int
    """Siblings leave the common rectangles when that saves so many computed tokens."""
    num_workers: int = 1
    """Passes that run at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Siblings:
    """Requests, by index, that continue one prompt."""

    key: bytes
    rectangles: list[list[int]]
    """Of similar response lengths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Passes over requests by index; together they name each request once."""

    alone: list[int]
    """`batch_invariant` requests."""
    rectangles: list[list[int]]
    """Prompt and response together."""
    siblings: list[Siblings]
    """Responses alone, after their prompts."""


_PASSES_PER_WORKER = 4
"""Enough that whoever was held up leaves the last ones to the others."""
_MIN_WORKER_TOKENS = 256
"""Below this a pass is too small to be worth a thread."""


def num_passes_at_once(lengths: Sequence[int], num_threads: int) -> int:
    """One pass for each thread where sequences divide evenly among them, otherwise 1: all threads share a pass."""
    share = sum(lengths) / num_threads
    return num_threads if share >= max(_MIN_WORKER_TOKENS, 2 * max(lengths, default=0)) else 1


def plan_passes(
    requests: Sequence[ScoreRequest], limits: PassLimits, is_cached: Callable[[bytes], bool] | None
) -> Plan:
    """`is_cached` tells whether a prompt was computed before; None plans without siblings."""
    alone = [index for index, request in enumerate(requests) if request.batch_invariant]
    groups: dict[bytes, list[int]] = {}
    for index, request in enumerate(requests):
        if not request.batch_invariant:
            groups.setdefault(prompt_key(request.prompt_token_ids), []).append(index)
    shared: dict[bytes, list[int]] = {}
    common: list[int] = []
    for key, indices in groups.items():
        if is_cached is not None and _saved_tokens(requests, indices, is_cached(key)) >= limits.min_saved_tokens:
            shared[key] = indices
        else:
            common += indices

    def rectangles(indices: Sequence[int], length: Callable[[ScoreRequest], int]) -> list[list[int]]:
        lengths = [length(requests[index]) for index in indices]
        planned = plan_rectangles(lengths, max_tokens, limits.max_padding_share)
        return [[indices[place] for place in places] for places in planned]

    num_tokens = sum(requests[index].num_tokens for indices in groups.values() for index in indices)
    max_tokens = limits.max_tokens
    if limits.num_workers > 1:
        max_tokens = min(max_tokens, num_tokens // (limits.num_workers * _PASSES_PER_WORKER))
    return Plan(
        alone=alone,
        rectangles=rectangles(common, lambda request: request.num_tokens),
        siblings=[
            Siblings(key=key, rectangles=rectangles(indices, lambda request: request.response_token_ids.size))
            for key, indices in shared.items()
        ],
    )


def _saved_tokens(requests: Sequence[ScoreRequest], indices: Sequence[int], is_cached: bool) -> int:
    return int(requests[indices[0]].prompt_token_ids.size) * (len(indices) - (not is_cached))


def plan_rectangles(lengths: Sequence[int], max_tokens: int, max_padding_share: float) -> list[list[int]]:
    """Indices of `lengths`, longest first, in rectangles of at most `max_tokens`; a longer sequence has its own."""
    planned: list[list[int]] = []
    width = num_tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        area = width * (len(planned[-1]) + 1) if planned else 0
        num_real = num_tokens + lengths[index]
        if not planned or area > max_tokens or area - num_real > max_padding_share * area:
            planned.append([])
            width, num_real = lengths[index], lengths[index]
        planned[-1].append(index)
        num_tokens = num_real
    return planned


def pad_right(sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    """Token ids [B, T].

    A sequence is padded with its own first id: causal attention gives padding a weight of exactly zero, but zero times
    the NaN of a broken embedding row is NaN, and that must never come from a row the request did not use.
    """
    ids_BT = np.zeros((len(sequences), max(sequence.size for sequence in sequences)), np.int64)
    for row, sequence in enumerate(sequences):
        if sequence.size:
            ids_BT[row] = sequence[0]
            ids_BT[row, : sequence.size] = sequence
    return ids_BT
