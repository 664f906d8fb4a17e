"""The least recently used prompts go first, and never more is held than allowed."""

import numpy as np
import torch

from services.teacher_server.engines.prefix_cache import Prefix, PrefixCache, prompt_key


def prefix(num_tokens: int) -> Prefix:
    part = torch.zeros(1, 2, num_tokens, 4)
    return Prefix(layers=((part, part),), last_hidden_H=torch.zeros(8))


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(10)
    cache.put(b"a", prefix(4))
    cache.put(b"b", prefix(4))
    assert cache.get(b"a") is not None
    cache.put(b"c", prefix(4))
    assert [key in cache for key in (b"a", b"b", b"c")] == [True, False, True]
    assert cache.num_tokens == 8


def test_what_is_too_long_is_not_kept_and_drops_nothing() -> None:
    cache = PrefixCache(10)
    cache.put(b"a", prefix(4))
    cache.put(b"b", prefix(11))
    assert b"a" in cache and b"b" not in cache and cache.get(b"b") is None


def test_keeping_twice_counts_once() -> None:
    cache = PrefixCache(10)
    for _ in range(3):
        cache.put(b"a", prefix(4))
    assert cache.num_tokens == 4
    cache.clear()
    assert cache.num_tokens == 0 and b"a" not in cache


def test_keys_tell_prompts_apart_whatever_their_memory_looks_like() -> None:
    ids = np.arange(20, dtype=np.int32)
    assert prompt_key(ids[::2]) == prompt_key(ids[::2].copy()) == prompt_key(ids[::2].astype(np.int64))
    assert len({prompt_key(ids), prompt_key(ids[:-1]), prompt_key(ids[::-1])}) == 3


def test_what_is_not_finite_is_not_kept() -> None:
    cache = PrefixCache(10)
    broken = prefix(4)
    broken.last_hidden_H[3] = torch.nan
    cache.put(b"a", broken)
    assert b"a" not in cache and cache.num_tokens == 0
