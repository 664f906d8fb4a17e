"""The output head as a stream of messages, from any byte on, and each message as a record again."""

from collections.abc import Iterator
from dataclasses import dataclass

from opd.errors import InternalError, InvalidRequestError
from opd.types import SharedHead
from opd.wire.pb import teacher_pb2 as pb

_DTYPES = {"float32": pb.DTYPE_FLOAT32, "bfloat16": pb.DTYPE_BFLOAT16, "float16": pb.DTYPE_FLOAT16}
_NAMES = {number: name for name, number in _DTYPES.items()}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadPart:
    """One message of a head on its way: `data` stands at `offset_bytes` of the weight."""

    sha256: str
    shape: tuple[int, int]
    """(V, H)"""
    dtype: str
    offset_bytes: int
    data: bytes
    bias: bytes = b""
    """In the first part of a call, when the head has one."""


def head_messages(head: SharedHead, offset_bytes: int, chunk_bytes: int) -> Iterator[pb.GetOutputHeadResponse]:
    """What is left of the weight after `offset_bytes`, at least one message; InvalidRequestError beyond its end."""
    num_bytes = len(head.weight)
    if offset_bytes > num_bytes:
        raise InvalidRequestError(f"offset_bytes={offset_bytes}: the weight has {num_bytes}; start again at 0")
    starts = range(offset_bytes, num_bytes, chunk_bytes) or [num_bytes]
    return (
        pb.GetOutputHeadResponse(
            sha256=head.sha256,
            shape=head.shape,
            dtype=_DTYPES[head.dtype],
            offset_bytes=start,
            data=bytes(head.weight[start : start + chunk_bytes]),
            bias=head.bias if start == offset_bytes else b"",
        )
        for start in starts
    )


def head_part(message: pb.GetOutputHeadResponse) -> HeadPart:
    """The record of a message; InternalError when it says nothing of a matrix."""
    if message.dtype not in _NAMES or len(message.shape) != 2 or not all(message.shape):
        raise InternalError(
            f"output head: dtype {message.dtype} and shape {list(message.shape)} came, a matrix of "
            f"{', '.join(_DTYPES)} was expected"
        )
    return HeadPart(
        sha256=message.sha256,
        shape=(message.shape[0], message.shape[1]),
        dtype=_NAMES[message.dtype],
        offset_bytes=message.offset_bytes,
        data=message.data,
        bias=message.bias,
    )
