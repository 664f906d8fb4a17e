"""Attention inside each of many documents that lie in one row, for transformers models.

N tokens of all documents, U of them with shared prompts once, G documents of a group, S the longest of them, h heads, D
head size. transformers' own way is a mask [N, N], which at 32,000 tokens is a gigabyte and has every token multiplied
with every other. Here each group of documents is an ordinary causal batch without a mask: what pads it on the right
comes after every real token, so that none sees it. Windows are cut into blocks, so that their masks are of the window's
size.

It is switched on for the length of a forward pass, and again wherever a layer is recomputed on the way back.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from opd.errors import UnsupportedError
from services.trainer.packing import Group, PackedTokens, Sharing

ATTENTION_NAME = "sdpa_in_documents"
BASE_ATTENTION = "sdpa"
"""What a model has to be loaded with."""
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class _Pass:
    """What is being run: read by every attention layer."""

    config: Any
    groups: tuple[Group, ...]
    sharing: Sharing | None
    windows: list[int | None] = field(default_factory=list)
    """Of every layer that attended, in their order."""


class _Current(threading.local):
    """Of this thread: on CUDA the way back runs in another one than the way there."""

    value: _Pass | None = None


_current = _Current()


@contextmanager
def inside_documents(config: Any, tokens: PackedTokens) -> Iterator[list[int | None]]:
    """Within it the model of this text configuration, given [1, U] ids and positions, attends inside documents.

    Yields the list to which every layer adds its window as it attends.
    """
    current = _Pass(config, tokens.groups, tokens.sharing)
    with _entered(current):
        yield current.windows


def recompute_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: the second has a recomputed layer attend as it does now."""
    current = _current.value
    return nullcontext(), nullcontext() if current is None else _entered(current)


@contextmanager
def _entered(current: _Pass) -> Iterator[None]:
    implementation, before = current.config._attn_implementation, _current.value
    current.config._attn_implementation, _current.value = ATTENTION_NAME, current
    try:
        yield
    finally:
        current.config._attn_implementation, _current.value = implementation, before


def why_not_packable(config: Any) -> str | None:
    """What in a text configuration rules packing out; None where nothing does, and the model has to be tried."""
    if config._attn_implementation != BASE_ATTENTION:
        return f"attn_implementation={config._attn_implementation!r}"
    unknown = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    return f"{', '.join(sorted(unknown))} layers" if unknown else None


def expected_windows(config: Any) -> list[int | None]:
    """The window of each layer that a text configuration declares; None for a layer that sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [1, h, U, D], key and value [1, H, U, D] -> [1, U, h, D], and no weights.

    A shared prompt is laid out for each of its documents here, where it costs least; its own tokens' attention is taken
    from the first of them.
    """
    current = _current.value
    extra = [name for name in ("position_bias", "s_aux", "cache") if options.get(name) is not None]
    if current is None or attention_mask is not None or extra or query.shape[2] != key.shape[2]:
        raise UnsupportedError(f"{type(module).__name__} attends in a way not known here")
    current.windows.append(sliding_window)
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]
    sharing = current.sharing
    if sharing is not None:
        rows = [sharing.spread(row) for row in rows]
    attended = []
    for group in current.groups:
        states = [group.padded(row).transpose(1, 2) for row in rows]
        if sliding_window is not None and group.longest > sliding_window:
            found = _in_windows(module, states, sliding_window, options)
        else:
            found = sdpa_attention_forward(module, *states, None, **options)[0]
        attended.append(group.packed(found))
    attended_N = torch.cat(attended)
    return (attended_N if sharing is None else sharing.kept(attended_N))[None], None


def _in_windows(module: torch.nn.Module, states: list[Tensor], window: int, options: dict[str, Any]) -> Tensor:
    """Query, key and value [G, h, S, D] -> [G, S, h, D], each token seeing itself and the window - 1 before it.

    Queries lie in blocks of a window's length, each of which sees its own keys and those of the block before.
    """
    num_documents, num_tokens = states[0].shape[0], states[0].shape[2]
    front = sdpa_attention_forward(module, *[state[:, :, :window] for state in states], None, **options)[0]
    missing = -num_tokens % window
    query, key, value = [functional.pad(state, (0, 0, 0, missing)) for state in states]
    blocks = [
        query[:, :, window:].unflatten(2, (-1, window)),
        # unfold puts the unfolded dimension last.
        *[state.unfold(2, 2 * window, window).transpose(-1, -2) for state in (key, value)],
    ]
    queries_W1 = torch.arange(window, device=query.device)[:, None]
    ahead = torch.arange(2 * window, device=query.device)[None] - queries_W1
    side_by_side = [block.transpose(1, 2).flatten(0, 1) for block in blocks]
    found = sdpa_attention_forward(module, *side_by_side, ((ahead > 0) & (ahead <= window))[None, None], **options)[0]
    rest = found.unflatten(0, (num_documents, -1)).flatten(1, 2)
    return torch.cat([front, rest], dim=1)[:, :num_tokens]


AttentionInterface.register(ATTENTION_NAME, _attention)
