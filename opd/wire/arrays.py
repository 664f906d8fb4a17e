"""NumPy arrays to the wire's `Array` message and back: dtype, shape and little-endian bytes.

Decoding trusts nothing: the dtype must be one the caller accepts, the number of dimensions must be the expected one,
and the byte count must equal what the shape says, before a single element is read.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.errors import InvalidRequestError
from opd.types import Encoding, Floats, Ids, Mask
from opd.wire.pb import teacher_pb2 as pb

_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
    pb.DTYPE_BOOL: np.dtype("?"),
    # NumPy has no bfloat16: its bits, which are the upper half of a float32.
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),
}
_FLOAT_DTYPES = (pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT16)


def encode_ids(ids: Ids) -> pb.Array:
    """Token ids of any shape."""
    return _encode(ids, pb.DTYPE_INT32)


def encode_mask(mask: Mask) -> pb.Array:
    """A boolean mask of any shape."""
    return _encode(mask, pb.DTYPE_BOOL)


def encode_floats(values: Floats, encoding: Encoding) -> pb.Array:
    """Log-probs or entropies, rounded once to the encoding asked for."""
    return _encode(values, pb.DTYPE_FLOAT16 if encoding is Encoding.FLOAT16 else pb.DTYPE_FLOAT32)


def decode_ids(message: pb.Array, name: str, num_dims: int) -> Ids:
    """int32 array; raises InvalidRequestError naming `name`."""
    return _decode(message, name, num_dims, (pb.DTYPE_INT32,)).astype(np.int32)


def decode_mask(message: pb.Array, name: str, num_dims: int) -> Mask:
    """Boolean array; raises InvalidRequestError naming `name`."""
    return _decode(message, name, num_dims, (pb.DTYPE_BOOL,)).astype(np.bool_)


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
    if len(message.shape) != num_dims:
        raise InvalidRequestError(f"{name}: {len(message.shape)} dimensions given, {num_dims} expected")
    dtype = _DTYPES[message.dtype]
    num_elements = 1
    for size in message.shape:
        num_elements *= size
    if num_elements * dtype.itemsize != len(message.data):
        raise InvalidRequestError(
            f"{name}: {len(message.data)} bytes given, "
            f"shape {tuple(message.shape)} needs {num_elements * dtype.itemsize}"
        )
    return np.frombuffer(message.data, dtype=dtype).reshape(tuple(message.shape))
