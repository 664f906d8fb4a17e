"""What a forward pass keeps of its attention keys and values: prompts, or nothing.

B sequences, L tokens of a prompt, D head size. A library's own cache keeps the keys and values of all tokens in all
layers until the pass is over, and copies a prompt for each of its siblings in all layers. These keep what is asked
for, one layer at a time, so that a pass holds no more than one without a cache.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class PromptsLayer(DynamicLayer):
    """Attention as without a cache; keeps copies of the first `sizes[row]` keys and values of some rows."""

    def __init__(self, sizes: Mapping[int, int]) -> None:
        super().__init__()
        self._sizes = sizes
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        """By row, [1, heads, L, D] each."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Returns what it is given."""
        # Copies, because a view would keep the whole rectangle alive.
        self.prompts = {
            row: (key_states[row : row + 1, :, :size].clone(), value_states[row : row + 1, :, :size].clone())
            for row, size in self._sizes.items()
        }
        return key_states, value_states


class SharedLayer(DynamicLayer):
    """Puts one prompt's keys and values [1, heads, L, D] in front of those of every sequence, and keeps no others."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Returns keys and values [B, heads, L + T, D]."""
        num_sequences = key_states.shape[0]
        return (
            torch.cat([self.keys.expand(num_sequences, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(num_sequences, -1, -1, -1), value_states], dim=-2),
        )
