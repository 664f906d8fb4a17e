"""Whom a failed call met; servers that do speak TLS or gRPC are in tests/unit/teacher_server/test_gate.py."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from opd.errors import TeacherUnavailableError
from opd.rpc.client import GrpcScoreClient
from opd.rpc.scheme import wrong_scheme


@pytest.fixture
async def closing_port() -> AsyncIterator[int]:
    """Where every connection is closed at once, as a proxy does whose servers are away."""

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with await asyncio.start_server(close, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def test_a_port_that_closes_is_a_teacher_that_is_away(closing_port: int) -> None:
    for scheme in ("grpc", "grpcs"):
        async with GrpcScoreClient(f"{scheme}://127.0.0.1:{closing_port}") as client:
            with pytest.raises(TeacherUnavailableError):
                await client.info()


@pytest.mark.parametrize("target", ["unix:/run/teacher.sock", "unix:///run/teacher.sock", "teachers", "[::1]:1", "h:x"])
async def test_what_cannot_be_probed_is_not_judged(target: str) -> None:
    assert await wrong_scheme(target, "Socket closed", is_encrypted=False) is None
