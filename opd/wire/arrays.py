"""NumPy arrays to the wire's `Array` message and back: dtype, shape and little-endian bytes.

Decoding trusts nothing: the dtype must be one the caller accepts, the number of dimensions must be the expected one,
and the byte count must equal what the shape says, before a single element is read or a byte allocated for one. Ids
and masks are packed to the bits they need; decoders take them unpacked as well.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.errors import InvalidRequestError
from opd.types import PAD_ID, Encoding, Floats, Ids, Mask
from opd.wire import bits
from opd.wire.pb import teacher_pb2 as pb

MAX_PACKED_ELEMENTS = 1 << 24
"""Of one array: a short message must not be able to ask for a large allocation."""
_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
    pb.DTYPE_BOOL: np.dtype("?"),
    # NumPy has no bfloat16: its bits, which are the upper half of a float32.
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),
}
_FLOAT_DTYPES = (pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT16)
_ID_DTYPES = (pb.DTYPE_PACKED_IDS, pb.DTYPE_INT32)
_MASK_DTYPES = (pb.DTYPE_BITS, pb.DTYPE_BOOL)
_MAX_FLOAT16 = float(np.finfo(np.float16).max)


def encode_ids(ids: Ids) -> pb.Array:
    """Token ids of any shape, packed to the width of the largest one; `PAD_ID` is kept.

    Ids that cannot exist (below `PAD_ID`) or too many of them go as they are, for the receiver to refuse by name.
    """
    if ids.size > MAX_PACKED_ELEMENTS or (ids.size and ids.min() < PAD_ID):
        return _encode(ids, pb.DTYPE_INT32)
    # One more than the id, so that padding is 0; int64 because the largest int32 has a successor too.
    stored = ids.astype(np.int64) - PAD_ID
    width = max(1, int(stored.max(initial=0)).bit_length())
    data = bits.pack_bits(stored.astype(np.uint32), width)
    return pb.Array(dtype=pb.DTYPE_PACKED_IDS, shape=ids.shape, data=data, bit_width=width)


def encode_mask(mask: Mask) -> pb.Array:
    """A boolean mask of any shape, eight to the byte."""
    data = np.packbits(np.asarray(mask, np.bool_), bitorder="little").tobytes()
    return pb.Array(dtype=pb.DTYPE_BITS, shape=mask.shape, data=data)


def encode_floats(values: Floats, encoding: Encoding) -> pb.Array:
    """Log-probs or entropies, rounded once (to nearest, ties to even) to the encoding asked for."""
    if encoding is Encoding.FLOAT32:
        return _encode(values, pb.DTYPE_FLOAT32)
    return _encode(round_to_float16(values), pb.DTYPE_FLOAT16)


def round_to_float16(values: Floats) -> NDArray[np.float16]:
    """A finite value stays finite: what is beyond float16's range (65,504) becomes its end. NaN and infinity stay."""
    inside = np.clip(values, -_MAX_FLOAT16, _MAX_FLOAT16)
    return np.where(np.isinf(values), values, inside).astype(np.float16)


def decode_ids(message: pb.Array, name: str, num_dims: int) -> Ids:
    """int32 array from either form; raises InvalidRequestError naming `name`."""
    if message.dtype != pb.DTYPE_PACKED_IDS:
        return _decode(message, name, num_dims, _ID_DTYPES).astype(np.int32)
    if not 1 <= message.bit_width <= bits.MAX_BIT_WIDTH:
        raise InvalidRequestError(f"{name}: bit_width {message.bit_width} is outside 1 to {bits.MAX_BIT_WIDTH}")
    stored = _unpack(message, name, num_dims, message.bit_width)
    if stored.size and int(stored.max()) > 1 << 31:
        raise InvalidRequestError(f"{name}: id {int(stored.max()) + PAD_ID} is above {2**31 - 1}; ids are int32")
    # Modulo 2 ** 32 this is exactly one less, and 0 becomes PAD_ID.
    return (stored - np.uint32(1)).view(np.int32).reshape(tuple(message.shape))


def decode_mask(message: pb.Array, name: str, num_dims: int) -> Mask:
    """Boolean array from either form; raises InvalidRequestError naming `name`."""
    if message.dtype != pb.DTYPE_BITS:
        return _decode(message, name, num_dims, _MASK_DTYPES).astype(np.bool_)
    num_elements = _check_packed(message, name, num_dims, 1)
    flags = np.unpackbits(np.frombuffer(message.data, np.uint8), count=num_elements, bitorder="little")
    return flags.astype(np.bool_).reshape(tuple(message.shape))


def decode_floats(message: pb.Array, name: str, num_dims: int) -> Floats:
    """float32 array from either encoding; raises InvalidRequestError naming `name`."""
    return _decode(message, name, num_dims, _FLOAT_DTYPES).astype(np.float32)


def encode_exact(values: Floats) -> pb.Array:
    """Hidden states in the narrowest dtype that loses nothing, so a bf16 teacher's travel as bf16."""
    bits = np.ascontiguousarray(values, np.dtype("<f4")).view("<u4")
    if not (bits & 0xFFFF).any():
        return _encode(bits >> 16, pb.DTYPE_BFLOAT16)
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    is_exact = np.array_equal(halves.astype(np.float32), values, equal_nan=True)
    return _encode(values, pb.DTYPE_FLOAT16 if is_exact else pb.DTYPE_FLOAT32)


def decode_exact(message: pb.Array, name: str, num_dims: int) -> Floats:
    """float32 array of the very values that were encoded; raises InvalidRequestError naming `name`."""
    found = _decode(message, name, num_dims, (*_FLOAT_DTYPES, pb.DTYPE_BFLOAT16))
    if message.dtype == pb.DTYPE_BFLOAT16:
        return (found.astype(np.uint32) << 16).view(np.float32)
    return found.astype(np.float32)


def _encode(array: NDArray[Any], dtype: "pb.DType") -> pb.Array:
    data = np.ascontiguousarray(array, dtype=_DTYPES[dtype]).tobytes()
    return pb.Array(dtype=dtype, shape=array.shape, data=data)


def _decode(message: pb.Array, name: str, num_dims: int, accepted: tuple[int, ...]) -> NDArray[Any]:
    if message.dtype not in accepted:
        names = " or ".join(pb.DType.Name(value) for value in accepted)
        raise InvalidRequestError(f"{name}: dtype {message.dtype} is not accepted; send {names}")
    dtype = _DTYPES[message.dtype]
    num_elements = _num_elements(message, name, num_dims)
    _check_length(message, name, num_elements * dtype.itemsize)
    return np.frombuffer(message.data, dtype=dtype).reshape(tuple(message.shape))


def _unpack(message: pb.Array, name: str, num_dims: int, width: int) -> NDArray[np.uint32]:
    num_elements = _check_packed(message, name, num_dims, width)
    return bits.unpack_bits(message.data, num_elements, width)


def _check_packed(message: pb.Array, name: str, num_dims: int, width: int) -> int:
    """The number of elements of a packed array that may be read."""
    num_elements = _num_elements(message, name, num_dims)
    if num_elements > MAX_PACKED_ELEMENTS:
        raise InvalidRequestError(
            f"{name}: shape {tuple(message.shape)} has more than {MAX_PACKED_ELEMENTS} elements; send less at once"
        )
    _check_length(message, name, bits.num_packed_bytes(num_elements, width))
    if bits.has_trailing_bits(message.data, num_elements, width):
        raise InvalidRequestError(f"{name}: bits after the last element are set; leave them zero")
    return num_elements


def _num_elements(message: pb.Array, name: str, num_dims: int) -> int:
    if len(message.shape) != num_dims:
        raise InvalidRequestError(f"{name}: {len(message.shape)} dimensions given, {num_dims} expected")
    num_elements = 1
    for size in message.shape:
        num_elements *= size
    return num_elements


def _check_length(message: pb.Array, name: str, num_bytes: int) -> None:
    if num_bytes != len(message.data):
        raise InvalidRequestError(
            f"{name}: {len(message.data)} bytes given, shape {tuple(message.shape)} needs {num_bytes}"
        )
