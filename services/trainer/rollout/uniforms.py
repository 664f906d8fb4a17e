"""Uniform random numbers that are a function of (seed, position), so that a row needs no generator and no order.

Each seed starts a SplitMix64 sequence (Steele, Lea and Flood, 2014) at a scrambled state; number i of the sequence is
found directly from i. Any subset of rows, in any order, on any device, draws the same numbers. Integers are int64 that
wrap, which is arithmetic modulo 2^64.
"""

import torch

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)
_BITS = 52
"""One bit less than a float64 holds, so that a uniform times any total stays below that total after rounding."""


def stream_states(seeds_B: torch.Tensor) -> torch.Tensor:
    """The start of each seed's sequence; [B] int64 in and out."""
    return _mix(seeds_B + _GAMMA)


def uniforms(states_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
    """Number `position` of each sequence; [B] float64 in [0, 1)."""
    mixed_B = _mix(states_B + (positions_B + 1) * _GAMMA)
    return _shift_right(mixed_B, 64 - _BITS).to(torch.float64) * 2.0**-_BITS


def _mix(values: torch.Tensor) -> torch.Tensor:
    values = (values ^ _shift_right(values, 30)) * _MULTIPLIER_1
    values = (values ^ _shift_right(values, 27)) * _MULTIPLIER_2
    return values ^ _shift_right(values, 31)


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    # The shift of a signed integer copies its sign; a logical shift fills with zeros.
    return (values >> bits) & ((1 << (64 - bits)) - 1)
