"""The head on disk: cut and resumed, verified, found broken, fetched once by many."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from opd.errors import ConfigError, InternalError, OpdError, PermissionDeniedError, TeacherUnavailableError
from opd.head_cache import HeadCache
from opd.types import Capability, TeacherInfo
from opd.wire.heads import HeadPart

ROWS, HIDDEN = 30, 16
WEIGHT = np.random.default_rng(0).standard_normal((ROWS, HIDDEN)).astype(np.float32)
BIAS = np.random.default_rng(1).standard_normal(ROWS).astype(np.float32)


def info_of(weight: bytes = WEIGHT.tobytes(), bias: bytes = b"", **changes: Any) -> TeacherInfo:
    fields: dict[str, Any] = {
        "teacher": "t", "fingerprint": "f", "model": "m", "engine": "e", "vocab_rows": ROWS, "num_defined_ids": 28,
        "id_map_hash": "h", "capabilities": frozenset(Capability), "hidden_size": HIDDEN,
        "output_head_hash": hashlib.sha256(weight + bias).hexdigest(), "logit_softcap": 30.0,
    }  # fmt: skip
    return TeacherInfo(**(fields | changes))


@dataclass
class Source:
    """A teacher's answers to GetOutputHead; `cut_at` ends the first calls with an error at these bytes."""

    info: TeacherInfo = field(default_factory=info_of)
    weight: bytes = WEIGHT.tobytes()
    bias: bytes = b""
    chunk_bytes: int = 100
    cut_at: list[int] = field(default_factory=list)
    error: OpdError = field(default_factory=lambda: TeacherUnavailableError("cut"))
    shape: tuple[int, int] = (ROWS, HIDDEN)
    calls: list[int] = field(default_factory=list)

    async def parts(self, offset: int) -> AsyncGenerator[HeadPart, None]:
        self.calls.append(offset)
        cut = self.cut_at.pop(0) if self.cut_at else None
        for start in range(offset, len(self.weight), self.chunk_bytes) or [offset]:
            if cut is not None and start >= cut:
                raise self.error
            await asyncio.sleep(0)
            yield HeadPart(
                sha256=self.info.output_head_hash, shape=self.shape, dtype="float32", offset_bytes=start,
                data=self.weight[start : start + self.chunk_bytes], bias=self.bias if start == offset else b"",
            )  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


def check(path: Path, *, has_bias: bool = False) -> None:
    found = load_file(path)
    np.testing.assert_array_equal(found["weight"], WEIGHT)
    assert ("bias" in found) == has_bias
    if has_bias:
        np.testing.assert_array_equal(found["bias"], BIAS)


def with_bias(**changes: Any) -> Source:
    bias = BIAS.tobytes()
    return Source(info=info_of(bias=bias), bias=bias, **changes)


@pytest.mark.parametrize("has_bias", [False, True])
async def test_it_is_fetched_once(tmp_path: Path, has_bias: bool) -> None:
    source, cache = with_bias() if has_bias else Source(), HeadCache(tmp_path)
    first, second = [await cache.fetch(source.info, source.parts) for _ in range(2)]
    assert first == second and source.calls == [0]
    assert (first.num_defined_ids, first.logit_softcap, first.sha256) == (28, 30.0, source.info.output_head_hash)
    check(first.path, has_bias=has_bias)
    assert names(tmp_path) == [".lock", ".safetensors"]


async def test_a_cut_download_goes_on_where_it_was_also_in_another_process(tmp_path: Path) -> None:
    source = with_bias(cut_at=[250, 700, 1900])
    for _ in range(3):
        with pytest.raises(TeacherUnavailableError, match="cut"):
            await HeadCache(tmp_path).fetch(source.info, source.parts)
    file = await HeadCache(tmp_path).fetch(source.info, source.parts)
    assert source.calls == [0, 300, 700, 1900]
    check(file.path, has_bias=True)


async def test_a_cut_before_the_first_byte_and_after_the_last_are_no_special_cases(tmp_path: Path) -> None:
    source = with_bias(cut_at=[0])
    with pytest.raises(TeacherUnavailableError):
        await HeadCache(tmp_path).fetch(source.info, source.parts)
    # Killed between the last byte and the new name.
    file = await HeadCache(tmp_path).fetch(source.info, source.parts)
    file.path.rename(file.path.with_suffix(".part"))
    file = await HeadCache(tmp_path).fetch(source.info, source.parts)
    assert source.calls == [0, 0, WEIGHT.nbytes]
    check(file.path, has_bias=True)


@pytest.mark.parametrize("place", [0, 20, -1])
async def test_a_broken_cache_is_found_and_fetched_again(
    tmp_path: Path, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source()
    file = await HeadCache(tmp_path).fetch(source.info, source.parts)
    content = bytearray(file.path.read_bytes())
    content[place] ^= 1
    file.path.write_bytes(content)
    file = await HeadCache(tmp_path).fetch(source.info, source.parts)
    assert source.calls == [0, 0] and "is broken and is fetched again" in caplog.text
    check(file.path)


async def test_a_broken_part_costs_one_more_download(tmp_path: Path) -> None:
    source = Source(cut_at=[900])
    cache = HeadCache(tmp_path)
    with pytest.raises(TeacherUnavailableError):
        await cache.fetch(source.info, source.parts)
    part = tmp_path / f"{source.info.output_head_hash}.part"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(TeacherUnavailableError, match="what was kept on disk is broken"):
        await cache.fetch(source.info, source.parts)
    check((await cache.fetch(source.info, source.parts)).path)
    assert source.calls == [0, 900, 0]


async def test_bytes_that_are_not_the_ones_announced_are_refused(tmp_path: Path) -> None:
    source = Source(weight=bytes(WEIGHT.nbytes))
    with pytest.raises(InternalError, match="the bytes that came have another hash"):
        await HeadCache(tmp_path).fetch(source.info, source.parts)
    assert names(tmp_path) == [".lock"]


async def test_another_replicas_head_is_asked_for_again(tmp_path: Path) -> None:
    source = Source(info=info_of(b"other"))
    with pytest.raises(TeacherUnavailableError, match="a replica with head"):
        await HeadCache(tmp_path).fetch(info_of(), source.parts)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(shape=(ROWS + 1, HIDDEN)), r"shape \(31, 16\) came, the handshake said \(30, 16\)"),
        (Source(weight=WEIGHT.tobytes() + bytes(8)), "byte 1900 came after 1900"),
    ],
)
async def test_no_more_is_written_than_was_announced(tmp_path: Path, source: Source, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        await HeadCache(tmp_path).fetch(source.info, source.parts)


async def test_a_refusal_passes_through(tmp_path: Path) -> None:
    source = Source(cut_at=[0], error=PermissionDeniedError("no right"))
    with pytest.raises(PermissionDeniedError, match="no right"):
        await HeadCache(tmp_path).fetch(source.info, source.parts)


async def test_many_who_want_it_at_once_fetch_it_once(tmp_path: Path) -> None:
    source = Source()
    files = await asyncio.gather(*(HeadCache(tmp_path).fetch(source.info, source.parts) for _ in range(5)))
    assert source.calls == [0] and len(set(files)) == 1


@pytest.mark.parametrize("bad", ["", "../../etc/passwd", "A" * 64])
async def test_a_hash_that_is_none_never_becomes_a_path(tmp_path: Path, bad: str) -> None:
    with pytest.raises(InternalError, match="is no sha256"):
        await HeadCache(tmp_path).fetch(info_of(output_head_hash=bad), Source().parts)
    assert names(tmp_path) == []


async def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"head cache .*file/heads: cannot be written \(Not a directory\)"):
        await HeadCache(tmp_path / "file/heads").fetch(info_of(), Source().parts)
