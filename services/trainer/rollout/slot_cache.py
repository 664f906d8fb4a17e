"""Keys and values of a batch whose rows come and go: one slot a row, each row at its own length.

Legend: S slots, N rows in use (always the first N slots), H key-value heads, L tokens, D head size. A row's token i
lies at place i of its slot, so rows of any length share a batch without padding on the left and without concatenation;
a mask by length hides what is left over from earlier rows. Storage doubles when rows outgrow it.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """The forward pass runs distinct prompts; row `sources_M[i]` of it is stored in slot `slots_M[i]`."""

    slots_M: torch.Tensor
    sources_M: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """The forward pass runs one token for each of the first N slots, stored at place `positions_N`."""

    rows_N: torch.Tensor
    positions_N: torch.Tensor
    horizon: int
    """How many places of each slot attention looks at: 1 + the largest position."""


class SlotCache(Cache):
    """A transformers cache over slots. Set `plan` before each forward pass of the model."""

    def __init__(self, *, num_layers: int, num_slots: int, kind: object = None) -> None:
        super().__init__(layers=[SlotLayer(self, num_slots) for _ in range(num_layers)])
        self.plan: Prefill | Decode | None = None
        self.num_slots = num_slots
        self.kind = kind
        self.capacity = 0

    def fits(self, num_slots: int, kind: object) -> bool:
        """Whether this cache can hold that many rows of a model of this kind, such as (device, dtype)."""
        return num_slots <= self.num_slots and kind == self.kind

    def reserve(self, num_tokens: int, max_tokens: int) -> None:
        """Makes every slot hold at least `num_tokens`; grows by doubling, never above `max_tokens` unless it must."""
        if num_tokens <= self.capacity:
            return
        self.capacity = max(num_tokens, min(2 * self.capacity, max_tokens))
        for layer in self.layers:
            layer.grow(self.capacity)

    def move(self, sources_M: torch.Tensor, targets_M: torch.Tensor, num_tokens: int) -> None:
        """Copies the first `num_tokens` places of each source slot into its target slot; the two must be disjoint."""
        for layer in self.layers:
            layer.keys[targets_M, :, :num_tokens] = layer.keys[sources_M, :, :num_tokens]
            layer.values[targets_M, :, :num_tokens] = layer.values[sources_M, :, :num_tokens]


class SlotLayer(CacheLayerMixin):
    """One layer's slots: [S, H, capacity, D]."""

    def __init__(self, owner: SlotCache, num_slots: int) -> None:
        super().__init__()
        self._owner = owner
        self._num_slots = num_slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, not garbage: a masked place has weight 0, and 0 times NaN would still be NaN.
        self.keys = self._zeros(key_states, self._owner.capacity)
        self.values = self._zeros(value_states, self._owner.capacity)
        self.is_initialized = True

    def _zeros(self, like: torch.Tensor, capacity: int) -> torch.Tensor:
        return like.new_zeros(self._num_slots, like.shape[1], capacity, like.shape[3])

    def grow(self, capacity: int) -> None:
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._zeros(old, capacity)
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new keys and values by the plan; returns those that attention is to look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self._owner.plan
        if isinstance(plan, Decode):
            self.keys[plan.rows_N, :, plan.positions_N] = key_states[:, :, 0]
            self.values[plan.rows_N, :, plan.positions_N] = value_states[:, :, 0]
            num_rows = plan.rows_N.shape[0]
            return self.keys[:num_rows, :, : plan.horizon], self.values[:num_rows, :, : plan.horizon]
        assert plan is not None
        self.keys[plan.slots_M, :, : key_states.shape[2]] = key_states[plan.sources_M]
        self.values[plan.slots_M, :, : key_states.shape[2]] = value_states[plan.sources_M]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1
