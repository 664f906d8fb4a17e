"""A real teacher follows its tenants file: tokens, limits in Redis, usage; the file changes under it."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from opd.client import ScoreClient
from opd.credentials import Credentials
from opd.errors import PermissionDeniedError, UnauthenticatedError
from opd.queue.embedded import EmbeddedRedis
from opd.queue.keys import PoolKeys
from services.teacher_server.tenants_file import add_tenant, add_token, drop_old_token, remove_tenant
from tests.integration.teacher_server.conftest import StartTeacher
from tests.unit.teacher_server.tiny_teachers import make_request

LIMITS = PoolKeys("tiny").limits


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        yield server


async def eventually(holds: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < give_up_at
        await asyncio.sleep(0.1)


async def ask(url: str, token: str | None, tenant: str = "math", seed: int = 1) -> str:
    """ok, or the code of the error."""
    client = ScoreClient.connect(
        url, teacher="tiny", tenant=tenant, patience_s=2.0, credentials=Credentials(token=token)
    )
    async with client:
        try:
            await client.score(make_request(seed, tenant=tenant, timeout_ms=20_000))
        except (UnauthenticatedError, PermissionDeniedError) as error:
            return error.code
    return "ok"


async def test_the_file_is_followed_everywhere(
    tmp_path: Path, redis: EmbeddedRedis, start_teacher: StartTeacher
) -> None:
    tenants = tmp_path / "tenants.toml"
    add_tenant(tenants, "math", "m1", weight=2.0, max_inflight_tokens=5000, hidden_states=False)
    teacher = start_teacher(f"tenants_file={tenants}", f"redis_url={redis.url}")
    direct = f"grpc://127.0.0.1:{teacher.wait_ready()['grpc_port']}"

    def limits() -> dict[bytes, bytes]:
        with Redis.from_url(redis.url) as raw:
            found: dict[bytes, bytes] = raw.hgetall(LIMITS)
            return found

    assert limits() == {b"weight:math": b"2.0", b"cap:math": b"5000"}
    assert await ask(direct, "m1") == "ok" and await ask(redis.url, None, seed=2) == "ok"
    assert await ask(direct, "wrong") == await ask(direct, None) == "unauthenticated"
    assert await ask(redis.url, None, "code") == "permission_denied"

    add_token(tenants, "math", "m2")
    add_tenant(tenants, "code", "c", weight=0.5, max_inflight_tokens=None, hidden_states=False)
    await eventually(lambda: b"weight:code" in limits())
    assert [await ask(direct, token) for token in ("m1", "m2")] == ["ok", "ok"]
    assert await ask(redis.url, None, "code") == "ok"
    drop_old_token(tenants, "math")
    remove_tenant(tenants, "code")
    await eventually(lambda: limits() == {b"weight:math": b"2.0", b"cap:math": b"5000"})
    assert [await ask(direct, token) for token in ("m1", "m2")] == ["unauthenticated", "ok"]
    assert await ask(direct, "c", "code") == "unauthenticated"
    assert await ask(redis.url, None, "code", seed=3) == "permission_denied"

    aside = tmp_path / "broken"
    aside.write_text("[tenants.")
    os.replace(aside, tenants)
    await eventually(lambda: "opd_teacher_tenants_file_sound 0.0" in teacher.get("/metrics").text)
    assert await ask(direct, "m2") == "ok" and "the tenants stay as they were" in teacher.log
    usage = teacher.get("/metrics").text
    assert 'opd_teacher_requests_total{tenant="math"} 6.0' in usage
    assert 'opd_teacher_tokens_total{tenant="math"} 72.0' in usage
    assert 'opd_teacher_tenant_engine_seconds_total{tenant="math"}' in usage and 'tenant="code"' not in usage
    assert teacher.end() == 0 and "Traceback" not in teacher.log


def test_a_broken_file_at_the_start_is_one_line(tmp_path: Path, start_teacher: StartTeacher) -> None:
    (tmp_path / "t.toml").write_text("[tenants.'m*']\ntoken_sha256 = ['" + "0" * 64 + "']\n")
    teacher = start_teacher(f"tenants_file={tmp_path / 't.toml'}")
    assert teacher.process.wait(90) == 2
    (line,) = teacher.log.splitlines()
    assert line.startswith(f"opd: {tmp_path / 't.toml'}: ") and "must match [a-z0-9-]{1,63}" in line


def test_it_does_not_listen_off_loopback_unprotected(start_teacher: StartTeacher) -> None:
    teacher = start_teacher("grpc.host=0.0.0.0")
    assert teacher.process.wait(90) == 2
    assert teacher.log.startswith("opd: grpc.host=0.0.0.0: would serve everybody; set tenants_file")
