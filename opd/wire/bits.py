"""Unsigned integers of a fixed number of bits, one after the other: how token ids and masks save their zeros.

Value i takes the bits [i * width, (i + 1) * width) of the stream, lowest bit first, in bytes filled from their lowest
bit; what is left of the last byte is zero. Works in blocks, so that the memory beyond input and output is bounded.
"""

import numpy as np
from numpy.typing import NDArray

MAX_BIT_WIDTH = 32
# A multiple of 8, so that every block starts at a byte.
_BLOCK = 1 << 16


def num_packed_bytes(num_values: int, bit_width: int) -> int:
    """What `pack_bits` makes of so many values."""
    return (num_values * bit_width + 7) // 8


def pack_bits(values: NDArray[np.uint32], bit_width: int) -> bytes:
    """The stream of a flat array; each value must be below 2 ** bit_width, with 1 <= bit_width <= 32."""
    flat = np.ascontiguousarray(values, dtype="<u4").reshape(-1)
    return b"".join(_pack_block(flat[start : start + _BLOCK], bit_width) for start in range(0, flat.size, _BLOCK))


def unpack_bits(data: bytes, num_values: int, bit_width: int) -> NDArray[np.uint32]:
    """Inverse of `pack_bits`; `data` must have `num_packed_bytes(num_values, bit_width)` bytes."""
    values = np.empty(num_values, np.uint32)
    stream = np.frombuffer(data, np.uint8)
    for start in range(0, num_values, _BLOCK):
        block = values[start : start + _BLOCK]
        first_byte = start * bit_width // 8
        block[:] = _unpack_block(stream[first_byte : first_byte + _BLOCK * bit_width // 8], block.size, bit_width)
    return values


def has_trailing_bits(data: bytes, num_values: int, bit_width: int) -> bool:
    """Whether a bit after the last value is set, which no encoder of ours does."""
    num_used = num_values * bit_width % 8
    return bool(num_used and data[-1] >> num_used)


def _pack_block(values: NDArray[np.uint32], bit_width: int) -> bytes:
    bits = np.unpackbits(values.view(np.uint8).reshape(-1, 4), axis=1, count=bit_width, bitorder="little")
    return np.packbits(bits, bitorder="little").tobytes()


def _unpack_block(stream: NDArray[np.uint8], num_values: int, bit_width: int) -> NDArray[np.uint32]:
    bits = np.unpackbits(stream, count=num_values * bit_width, bitorder="little").reshape(num_values, bit_width)
    columns = np.packbits(bits, axis=1, bitorder="little")
    words = np.zeros((num_values, 4), np.uint8)
    words[:, : columns.shape[1]] = columns
    return words.view("<u4").reshape(-1)
