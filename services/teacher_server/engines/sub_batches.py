"""How requests of different lengths share forward passes: sorted by length, in rectangles of bounded size.

A rectangle is as wide as its longest sequence; what the shorter ones leave empty is padding, which costs as much as
real tokens. Both the area of a rectangle and the share of padding in it are bounded.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def plan_sub_batches(lengths: Sequence[int], max_tokens: int, max_padding_share: float) -> list[list[int]]:
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
    ids_BT = np.empty((len(sequences), max(sequence.size for sequence in sequences)), np.int64)
    for row, sequence in enumerate(sequences):
        ids_BT[row] = sequence[0]
        ids_BT[row, : sequence.size] = sequence
    return ids_BT
