"""Prompts that were computed before: their attention keys and values, kept by the hash of the prompt's ids.

Rollouts of one prompt differ only after it, so whoever meets a prompt again continues from here. Bounded in tokens, the
least recently used prompt goes first. Passes that run at the same time may leave prompts here together.
"""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """What a continuation needs of a prompt of P tokens."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of each layer, [1, key-value heads, P, head size]."""
    last_hidden_H: Tensor
    """After the final norm at position P - 1, which predicts the first response token."""

    @property
    def num_tokens(self) -> int:
        """P."""
        return int(self.layers[0][0].shape[-2])


class PrefixCache:
    """Prefixes by key, together at most `max_tokens` long."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._lock = threading.Lock()
        self.num_tokens = 0
        """Held now."""

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def get(self, key: bytes) -> Prefix | None:
        """The prefix, which counts as used; None when it is not there."""
        with self._lock:
            prefix = self._kept.get(key)
            if prefix is not None:
                self._kept.move_to_end(key)
            return prefix

    def put(self, key: bytes, prefix: Prefix) -> None:
        """Keeps a prefix and lets go of the least recently used ones; too long or non-finite ones are not kept."""
        is_finite = bool(prefix.last_hidden_H.isfinite().all())
        if prefix.num_tokens > self._max_tokens or not is_finite:
            return
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = prefix
            self.num_tokens += prefix.num_tokens
            while self.num_tokens > self._max_tokens:
                _, dropped = self._kept.popitem(last=False)
                self.num_tokens -= dropped.num_tokens

    def clear(self) -> None:
        """Lets go of everything."""
        with self._lock:
            self._kept.clear()
            self.num_tokens = 0


def prompt_key(prompt_token_ids: NDArray[np.int32]) -> bytes:
    """Equal for equal prompts and for no others that will ever be met."""
    return hashlib.blake2b(np.ascontiguousarray(prompt_token_ids, np.int32).tobytes(), digest_size=16).digest()
