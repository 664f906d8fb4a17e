"""Examinations of real servers, and handshakes to announce without a model."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from opd.queue.score_consumer import LeaseRules, ScoreConsumer
from opd.types import TeacherInfo
from opd.wire.messages import encode_info
from services.doctor.command import examine
from services.doctor.findings import Finding, Verdict
from services.doctor.plan import Plan

Look = Callable[..., dict[str, Finding]]
Announce = Callable[..., Awaitable[ScoreConsumer]]


def handshake(fingerprint: str = "abc123", version: str = "0.1.0") -> bytes:
    return encode_info(
        TeacherInfo(
            teacher="qwen", fingerprint=fingerprint, model="tiny", engine="fake", vocab_rows=32, num_defined_ids=30,
            id_map_hash="0", version=version,
        )
    )  # fmt: skip


async def announced(url: str, name: str, info: bytes, pool: str = "qwen") -> ScoreConsumer:
    """A live replica of the pool."""
    consumer = await ScoreConsumer.connect(url, pool=pool, name=name, rules=LeaseRules(lease_ms=20_000))
    await consumer.publish_info(info)
    await consumer.announce(info, expiry_s=30.0)
    return consumer


@asynccontextmanager
async def altered(url: str, old: str, new: str) -> AsyncIterator[str]:
    """A way to the TCP server at `url` on which one text of its answers is exchanged for another of its length."""
    assert len(old) == len(new)
    target = int(url.rpartition(":")[2].partition("/")[0])

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data.replace(old.encode(), new.encode()))
            await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer), return_exceptions=True)

    relay = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with relay:
        yield url.replace(f":{target}/", f":{relay.sockets[0].getsockname()[1]}/")
        await asyncio.sleep(0.1)


async def findings_of(**plan: Any) -> dict[str, Finding]:
    """By check; each has a finding of its own."""
    findings = await examine(Plan(**({"patience_s": 0.5} | plan)))
    by_check = {finding.check: finding for finding in findings}
    assert len(by_check) == len(findings)
    assert all(bool(finding.mend) == (finding.verdict in (Verdict.WARN, Verdict.FAIL)) for finding in findings)
    return by_check


@pytest.fixture
def look() -> Look:
    return lambda **plan: asyncio.run(findings_of(**plan))
