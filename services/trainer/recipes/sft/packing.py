"""Examples side by side in rows, none of them seeing another.

B rows of a micro-batch, S their longest, T response positions of all of them one after the other. A token sees the
tokens of its own example before it and no others, and its position counts from the example's first token, so that an
example gives the same losses wherever it lies (as `tests` show).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MAX_OPEN_ROWS = 64
PADDING = 0
"""Segment of what belongs to no example."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SftExample:
    """A prompt and the response to imitate.

    Example: ``SftExample(name="12.0", prompt_token_ids=(5, 9, 2), response_token_ids=(7, 1))``.
    """

    name: str
    prompt_token_ids: tuple[int, ...]
    """[P] as the student sees it; P >= 1."""
    response_token_ids: tuple[int, ...]
    """[R], its EOS included; R >= 1. Only these are trained on."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.response_token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """One micro-batch."""

    input_ids_BS: Tensor
    """Padded on the right with id 0."""
    position_ids_BS: Tensor
    """From 0 within each example."""
    segment_ids_BS: Tensor
    """1, 2, ... by example within a row; `PADDING` after the last."""
    hidden_index_T: Tensor
    """Row of the flattened [B * S] hidden states that predicts each response token."""
    target_ids_T: Tensor
    """The response tokens."""


def pack_rows(examples: Sequence[SftExample], max_tokens: int, *, packing: bool = True) -> list[list[SftExample]]:
    """Puts examples, in their order, into rows of at most `max_tokens`: each into the first open row with room.

    The 64 youngest rows are open. Without `packing` a row holds one example. None may be above `max_tokens`.
    """
    rows: list[list[SftExample]] = []
    rooms: list[int] = []
    for example in examples:
        first = max(0, len(rows) - _MAX_OPEN_ROWS) if packing else len(rows)
        place = next((row for row in range(first, len(rows)) if rooms[row] >= example.num_tokens), len(rows))
        if place == len(rows):
            rows.append([])
            rooms.append(max_tokens)
        rows[place].append(example)
        rooms[place] -= example.num_tokens
    return rows


def row_tokens(row: Sequence[SftExample]) -> int:
    """Tokens of a row without padding."""
    return sum(example.num_tokens for example in row)


def build_packed_batch(rows: Sequence[Sequence[SftExample]], device: torch.device | str = "cpu") -> PackedBatch:
    """The rows of one micro-batch as tensors."""
    longest = max(row_tokens(row) for row in rows)
    input_ids_BS = torch.zeros(len(rows), longest, dtype=torch.int64)
    position_ids_BS = torch.zeros_like(input_ids_BS)
    segment_ids_BS = torch.full_like(input_ids_BS, PADDING)
    hidden_index: list[Tensor] = []
    targets: list[int] = []
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, start=1):
            end = start + example.num_tokens
            ids = example.prompt_token_ids + example.response_token_ids
            input_ids_BS[row, start:end] = torch.tensor(ids)
            position_ids_BS[row, start:end] = torch.arange(example.num_tokens)
            segment_ids_BS[row, start:end] = segment
            # The hidden state at index i predicts token i + 1, so the last token of all predicts nothing.
            first = row * longest + start + len(example.prompt_token_ids) - 1
            hidden_index.append(torch.arange(first, first + len(example.response_token_ids)))
            targets += example.response_token_ids
            start = end
    return PackedBatch(
        input_ids_BS=input_ids_BS.to(device),
        position_ids_BS=position_ids_BS.to(device),
        segment_ids_BS=segment_ids_BS.to(device),
        hidden_index_T=torch.cat(hidden_index).to(device),
        target_ids_T=torch.tensor(targets).to(device),
    )


def attention_masks(batch: PackedBatch, config: Any, dtype: torch.dtype) -> Any:
    """What each token may look at, [B, 1, S, S]; one mask per kind of layer where the model has several.

    `config` is the text configuration of a transformers model. Padding sees itself alone, so that no row of the
    softmax is empty.
    """
    segments_BS, positions_BS = batch.segment_ids_BS, batch.position_ids_BS
    num_tokens = segments_BS.shape[1]
    causal_SS = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=segments_BS.device).tril()
    own_BSS = (segments_BS[:, :, None] == segments_BS[:, None, :]) & causal_SS
    masks = {"full_attention": own_BSS}
    window = getattr(config, "sliding_window", None)
    if window is not None:
        masks["sliding_attention"] = own_BSS & (positions_BS[:, None, :] > positions_BS[:, :, None] - window)
    is_eager = config._attn_implementation == "eager"
    shaped = {name: _as_attention_takes_it(mask[:, None], dtype, is_eager) for name, mask in masks.items()}
    if getattr(config, "layer_types", None) is not None:
        return shaped
    return shaped["full_attention" if window is None else "sliding_attention"]


def _as_attention_takes_it(mask: Tensor, dtype: torch.dtype, is_eager: bool) -> Tensor:
    if not is_eager:
        return mask
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return additive.masked_fill_(~mask, torch.finfo(dtype).min)
