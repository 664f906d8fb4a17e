"""Output heads on disk, by their hash: fetched once, resumed where a connection was cut, verified whenever opened.

V rows of the head, H hidden size. A file is safetensors, written here byte by byte (8 bytes of header length, a JSON
header, the weight, the bias) because a head of gigabytes must neither be held in memory nor start again after a cut.
It grows as `HASH.part` under a lock that lets one process fetch and the others wait, and gets its name
`HASH.safetensors` when its bytes have the hash.
"""

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from opd.errors import ConfigError, InternalError, OpdError, TeacherUnavailableError, UnsupportedError
from opd.types import Capability, OutputHeadFile, TeacherInfo
from opd.wire.heads import ITEM_BYTES, HeadPart

DEFAULT_FOLDER = Path("~/.cache/opd/heads")
_log = logging.getLogger(__name__)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_LENGTH_BYTES = 8
_HASH_CHUNK_BYTES = 1 << 22
_LOCK_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """How a head lies in its file."""

    header: bytes
    weight_bytes: int
    bias_bytes: int


class HeadCache:
    """One folder of heads, which any number of processes may share."""

    def __init__(self, folder: Path = DEFAULT_FOLDER) -> None:
        self._folder = folder.expanduser()

    async def fetch(
        self, info: TeacherInfo, parts_from: Callable[[int], AsyncGenerator[HeadPart, None]]
    ) -> OutputHeadFile:
        """The head of the teacher that `info` describes, from disk or by `parts_from(offset_bytes)`.

        A retryable error leaves what has come on disk, and the next call goes on there. Raises UnsupportedError when
        the teacher hands out no head, ConfigError when the folder cannot be written.
        """
        _check_declared(info)
        final = self._folder / f"{info.output_head_hash}.safetensors"
        with _disk_faults(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            async with _locked(final.with_suffix(".lock")):
                if not await asyncio.to_thread(_is_sound, final, info):
                    await _download(final, info, parts_from)
        return OutputHeadFile(
            path=final,
            sha256=info.output_head_hash,
            num_defined_ids=info.num_defined_ids,
            logit_scale=info.logit_scale,
            logit_softcap=info.logit_softcap,
        )


def _check_declared(info: TeacherInfo) -> None:
    if Capability.HIDDEN_STATES not in info.capabilities:
        raise UnsupportedError(
            f"output head: teacher {info.teacher} does not serve hidden states; set hidden_states.enabled=true there"
        )
    # It becomes a file name here.
    if not _SHA256.fullmatch(info.output_head_hash):
        raise InternalError(f"output_head_hash={info.output_head_hash[:80]!r}: is no sha256")


async def _download(
    final: Path, info: TeacherInfo, parts_from: Callable[[int], AsyncGenerator[HeadPart, None]]
) -> None:
    part_file, name = final.with_suffix(".part"), info.output_head_hash[:12]
    with part_file.open("a+b") as stream:
        had_bytes = _weight_bytes_in(stream, info)
        async with aclosing(parts_from(had_bytes)) as parts:
            await _append(stream, info, had_bytes, parts)
        stream.flush()
        os.fsync(stream.fileno())
    if await asyncio.to_thread(_is_sound, part_file, info):
        part_file.replace(final)
        return
    part_file.unlink()
    if had_bytes:
        raise TeacherUnavailableError(f"output head {name}: what was kept on disk is broken; ask again")
    raise InternalError(f"output head {name}: the bytes that came have another hash; look at what stands between")


async def _append(stream: BinaryIO, info: TeacherInfo, written: int, parts: AsyncGenerator[HeadPart, None]) -> None:
    """Writes the header if there is none, then what comes, then the bias; a cut leaves what came."""
    name, layout, bias = info.output_head_hash[:12], None, b""
    async for part in parts:
        if part.sha256 != info.output_head_hash:
            raise TeacherUnavailableError(
                f"output head {name}: a replica with head {part.sha256[:12]} answered; ask again"
            )
        if layout is None:
            layout, bias = _begin(stream, info, part), part.bias
        if part.offset_bytes != written or written + len(part.data) > layout.weight_bytes:
            raise InternalError(f"output head {name}: byte {part.offset_bytes} came after {written}")
        await asyncio.to_thread(stream.write, part.data)
        written += len(part.data)
    if layout is None or (written, len(bias)) != (layout.weight_bytes, layout.bias_bytes):
        raise TeacherUnavailableError(f"output head {name}: the stream ended after {written} bytes; ask again")
    stream.write(bias)


def _begin(stream: BinaryIO, info: TeacherInfo, part: HeadPart) -> _Layout:
    """The layout that the first part tells, and its header in an empty file."""
    if part.shape != (info.vocab_rows, info.hidden_size):
        raise InternalError(
            f"output head {info.output_head_hash[:12]}: shape {part.shape} came, the handshake said "
            f"({info.vocab_rows}, {info.hidden_size})"
        )
    layout = _layout(part.shape, part.dtype, has_bias=bool(part.bias))
    if stream.seek(0, os.SEEK_END) == 0:
        stream.write(layout.header)
    elif _layout_in(stream, info) != layout:
        stream.truncate(0)
        raise TeacherUnavailableError(
            f"output head {info.output_head_hash[:12]}: what was kept on disk is another head's; ask again"
        )
    return layout


def _layout(shape: tuple[int, int], dtype: str, *, has_bias: bool) -> _Layout:
    code, num_bytes = _DTYPES[dtype], shape[0] * shape[1] * ITEM_BYTES[dtype]
    bias_bytes = shape[0] * ITEM_BYTES[dtype] if has_bias else 0
    tensors: dict[str, object] = {"weight": {"dtype": code, "shape": list(shape), "data_offsets": [0, num_bytes]}}
    if has_bias:
        offsets = [num_bytes, num_bytes + bias_bytes]
        tensors["bias"] = {"dtype": code, "shape": [shape[0]], "data_offsets": offsets}
    text = json.dumps(tensors).encode()
    # The data begin at a multiple of 8, as readers that map the file want it.
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return _Layout(
        header=len(text).to_bytes(_LENGTH_BYTES, "little") + text, weight_bytes=num_bytes, bias_bytes=bias_bytes
    )


def _layout_in(stream: BinaryIO, info: TeacherInfo) -> _Layout | None:
    """Whichever layout of the teacher's head the file begins with; None when it is no such file."""
    shape = (info.vocab_rows, info.hidden_size)
    for dtype in _DTYPES:
        for has_bias in (False, True):
            layout = _layout(shape, dtype, has_bias=has_bias)
            stream.seek(0)
            if stream.read(len(layout.header)) == layout.header:
                return layout
    return None


def _weight_bytes_in(stream: BinaryIO, info: TeacherInfo) -> int:
    """How much of the weight has come; a file that is no beginning of this head is emptied."""
    layout = _layout_in(stream, info)
    if layout is None:
        stream.truncate(0)
        return 0
    start, size = len(layout.header), stream.seek(0, os.SEEK_END)
    num_bytes = min(size - start, layout.weight_bytes)
    # The bias comes again with the rest.
    stream.truncate(start + num_bytes)
    return num_bytes


def _is_sound(path: Path, info: TeacherInfo) -> bool:
    """Whether the file is the head, header and data; blocks for as long as reading takes."""
    if not path.is_file():
        return False
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        layout = _layout_in(stream, info)
        if layout is not None:
            stream.seek(len(layout.header))
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    is_sound = layout is not None and digest.hexdigest() == info.output_head_hash
    if not is_sound:
        _log.warning("output head %s is broken and is fetched again", path)
    return is_sound


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Holds the lock of a head; the kernel lets it go when the process ends."""
    with path.open("a") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LOCK_POLL_S)
        yield


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except OpdError:
        # Some of ours are OSErrors too.
        raise
    except OSError as error:
        raise ConfigError(
            f"head cache {folder}: cannot be written ({error.strerror}); make room there or choose another folder"
        ) from None
