"""Packed bits against Python's own integers of any size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.wire.bits import has_trailing_bits, num_packed_bytes, pack_bits, unpack_bits


def by_hand(values: list[int], width: int) -> bytes:
    stream = sum(value << (index * width) for index, value in enumerate(values))
    return stream.to_bytes(num_packed_bytes(len(values), width), "little")


@st.composite
def columns(draw: st.DrawFn) -> tuple[list[int], int]:
    width = draw(st.integers(1, 32))
    return draw(st.lists(st.integers(0, 2**width - 1), max_size=70)), width


@given(columns())
@settings(max_examples=300, deadline=None)
def test_packing_is_one_long_number_in_little_endian(column: tuple[list[int], int]) -> None:
    values, width = column
    data = pack_bits(np.array(values, np.uint32), width)
    assert data == by_hand(values, width)
    np.testing.assert_array_equal(unpack_bits(data, len(values), width), np.array(values, np.uint32))
    assert not has_trailing_bits(data, len(values), width)


@pytest.mark.parametrize("num_values", [65_535, 65_536, 65_537, 200_003])
@pytest.mark.parametrize("width", [1, 5, 18, 32])
def test_blocks_join_without_a_seam(num_values: int, width: int) -> None:
    values = np.random.default_rng(width).integers(0, 2**width, num_values, dtype=np.uint32)
    data = pack_bits(values, width)
    assert len(data) == num_packed_bytes(num_values, width)
    np.testing.assert_array_equal(unpack_bits(data, num_values, width), values)
    head = 1001
    assert data[: head * width // 8] == by_hand(values[:head].tolist(), width)[: head * width // 8]


def test_a_set_bit_after_the_last_value_is_seen() -> None:
    assert has_trailing_bits(b"\x08", 3, 1)
    assert not has_trailing_bits(b"\x07", 3, 1)
    assert not has_trailing_bits(b"\xff", 8, 1)
    assert not has_trailing_bits(b"", 0, 18)
