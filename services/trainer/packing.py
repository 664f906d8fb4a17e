"""Sequences of many lengths laid out so that a pass over them computes next to nothing in vain.

B documents (a rollout's prompt and response each), N tokens of all of them one after the other, U of them that are left
when a prompt that several documents begin with counts once, T tokens that predict a response token, S the longest
document of a group. Layers that see one token at a time run on the U tokens: what a token of a prompt is depends on the
prompt alone. What mixes tokens (attention, or the whole model where an architecture cannot be packed) runs on groups of
neighbouring documents of nearly one length, [G, S] each, of which never more than a tenth is padding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from opd.types import Rollout

MAX_PADDING = 0.1
"""Share of a group's places that may be padding."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Neighbouring documents side by side: `tokens` of the N lie at `places` of the flattened [G * S]."""

    tokens: slice
    num_documents: int
    """G"""
    longest: int
    """S"""
    places: Tensor | None
    """Of every token, in order; None where all documents are of one length and the tokens fill the whole table."""

    def padded(self, values_N: Tensor) -> Tensor:
        """[N, ...] -> [G, S, ...], zeros after the end of a document."""
        values = values_N[self.tokens]
        rest = values.shape[1:]
        if self.places is not None:
            table = values.new_zeros(self.num_documents * self.longest, *rest)
            values = table.index_copy(0, self.places, values)
        return values.reshape(self.num_documents, self.longest, *rest)

    def packed(self, values_GS: Tensor) -> Tensor:
        """The way back: the group's part of [N, ...], without what is after the end of a document."""
        values = values_GS.flatten(0, 1)
        return values if self.places is None else values.index_select(0, self.places)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """Prompts that several documents begin with, computed once and read by all of them."""

    kept_U: Tensor
    """Index among the N tokens of those that are computed."""
    source_N: Tensor
    """Which of the U stands for each of the N tokens."""

    def spread(self, values_U: Tensor) -> Tensor:
        """[U, ...] -> [N, ...]"""
        return values_U.index_select(0, self.source_N)

    def kept(self, values_N: Tensor) -> Tensor:
        """[N, ...] -> [U, ...], of equal ones the first."""
        return values_N.index_select(0, self.kept_U)


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """What the student reads in one pass."""

    input_ids_N: Tensor
    """int64; prompts and responses, one document after the other."""
    lengths: tuple[int, ...]
    """[B] tokens of each document; they add up to N."""
    hidden_index_T: Tensor
    """Which of the N hidden states predicts each response token."""
    sharing: "Sharing | None" = None
    """Which tokens stand for which; None where no two documents begin with one prompt."""

    @property
    def response_ids_T(self) -> Tensor:
        return self.input_ids_N[self.hidden_index_T + 1]

    @cached_property
    def position_ids_N(self) -> Tensor:
        """From 0 within each document."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.input_ids_N.device)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All documents in their order. Few where they come sorted by length, as `split_by_tokens` has them."""
        return tuple(_group(self.lengths, *bounds, self.input_ids_N.device) for bounds in group_bounds(self.lengths))

    def as_one_group(self) -> Group:
        """All documents side by side, however unlike their lengths are."""
        return _group(self.lengths, 0, len(self.lengths), self.input_ids_N.device)

    @property
    def num_places(self) -> int:
        """Of all groups, those after the end of a document included."""
        return sum(group.num_documents * group.longest for group in self.groups)

    @property
    def padding_share(self) -> float:
        """Of the groups' places: what attention computes in vain, 0 to `MAX_PADDING`."""
        return 1.0 - len(self.input_ids_N) / self.num_places


def pack(rollouts: Sequence[Rollout], device: torch.device | str = "cpu") -> PackedTokens:
    """Lays out prompt and response of each rollout; at least one. Equal prompts are shared."""
    tokens: list[np.ndarray] = []
    hidden_index: list[Tensor] = []
    start = 0
    for rollout in rollouts:
        prompt, response = rollout.prompt_token_ids, rollout.response_token_ids
        tokens += [prompt, response]
        # The hidden state at index i predicts token i + 1, so the last prompt token predicts the first response token.
        first = start + prompt.size - 1
        hidden_index.append(torch.arange(first, first + response.size))
        start += prompt.size + response.size
    return PackedTokens(
        input_ids_N=torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(device),
        lengths=tuple(int(rollout.prompt_token_ids.size + rollout.response_token_ids.size) for rollout in rollouts),
        hidden_index_T=torch.cat(hidden_index).to(device),
        sharing=_shared_prompts(rollouts, device),
    )


def _shared_prompts(rollouts: Sequence[Rollout], device: torch.device | str) -> Sharing | None:
    kept: list[Tensor] = []
    source: list[Tensor] = []
    known: dict[bytes, Tensor] = {}
    start = num_kept = 0
    for rollout in rollouts:
        num_prompt, num_response = rollout.prompt_token_ids.size, rollout.response_token_ids.size
        prompt = rollout.prompt_token_ids.tobytes()
        begins = start
        if prompt in known:
            source.append(known[prompt])
            begins += num_prompt
        new = torch.arange(begins, start + num_prompt + num_response)
        places = torch.arange(num_kept, num_kept + len(new))
        known.setdefault(prompt, places[:num_prompt])
        kept.append(new)
        source.append(places)
        start += num_prompt + num_response
        num_kept += len(new)
    if num_kept == start:
        return None
    return Sharing(kept_U=torch.cat(kept).to(device), source_N=torch.cat(source).to(device))


def split_by_tokens(
    items: Sequence[Item], max_tokens: int, *, size: Callable[[Item], int], name: Callable[[Item], str]
) -> list[list[Item]]:
    """Parts of at most `max_tokens` tokens: each item, longest first, goes to the first part with room.

    An item longer than that gets a part of its own. Depends on sizes and names alone, never on the order given.
    """
    parts: list[list[Item]] = []
    rooms: list[int] = []
    for item in sorted(items, key=lambda item: (-size(item), name(item))):
        place = next((index for index, room in enumerate(rooms) if room >= size(item)), len(parts))
        if place == len(parts):
            parts.append([])
            rooms.append(max_tokens)
        parts[place].append(item)
        rooms[place] -= size(item)
    return parts


def group_bounds(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """First and last (exclusive) document of each group, which ends where the next would pad it above `MAX_PADDING`."""
    bounds: list[tuple[int, int]] = []
    first, longest, filled = 0, 0, 0
    for index, length in enumerate(lengths):
        places = (index + 1 - first) * max(longest, length)
        if index > first and filled + length < (1.0 - MAX_PADDING) * places:
            bounds.append((first, index))
            first, longest, filled = index, 0, 0
        longest, filled = max(longest, length), filled + length
    return [*bounds, (first, len(lengths))]


def _group(lengths: Sequence[int], first: int, last: int, device: torch.device) -> Group:
    inside = lengths[first:last]
    start, longest = sum(lengths[:first]), max(inside)
    places = None
    if min(inside) < longest:
        places = torch.cat([row * longest + torch.arange(length) for row, length in enumerate(inside)]).to(device)
    return Group(tokens=slice(start, start + sum(inside)), num_documents=len(inside), longest=longest, places=places)
