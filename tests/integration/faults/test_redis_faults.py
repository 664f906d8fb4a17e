"""Redis dies, forgets, fills up and cannot be reached, under real replicas. All faults: docs/faults.md."""

import asyncio
import shutil
from urllib.parse import urlsplit

import pytest
from redis import Redis

from tests.conftest import MakeRedis
from tests.integration.faults.conftest import KEYS, Pool, StartFragile, requests_of, student_of, until
from tests.integration.faults.relay import Relay

CUT_S = 10.0


@pytest.mark.parametrize("keeps_log", [True, False], ids=["aof", "no-aof"])
async def test_redis_killed_and_restarted(make_redis: MakeRedis, start_fragile: StartFragile, keeps_log: bool) -> None:
    """With its log nothing is even sent again; without it, everything open is."""
    server = make_redis(*(("appendfsync always",) if keeps_log else ("appendonly no",)))
    replica = await start_fragile(server.url, "only", tokens_per_s=400).ready()
    async with student_of(server.url) as student:
        student.ask(requests_of(60))
        await until(lambda: student.num_scored >= 12)
        server.kill()
        if not keeps_log:
            assert not list(server.data_dir.glob("**/*.aof"))
            shutil.rmtree(server.data_dir / "appendonlydir", ignore_errors=True)
        server.start()
        await student.check()
        assert (student.num_resubmitted == 0) if keeps_log else (0 < student.num_resubmitted <= 48)
        student.ask(requests_of(4, run="after"))
        await student.check()
    assert replica.process.poll() is None


async def test_redis_flushed_in_mid_run(make_redis: MakeRedis, start_fragile: StartFragile) -> None:
    """Twice; what the replica holds then is nobody's, and is answered to nobody."""
    server = make_redis()
    replica = await start_fragile(server.url, "only", tokens_per_s=400).ready()
    with Redis.from_url(server.url) as redis:
        async with student_of(server.url) as student:
            student.ask(requests_of(60))
            for num_scored in (12, 30):
                await until(lambda num_scored=num_scored: student.num_scored >= num_scored)  # type: ignore[misc]
                redis.flushall()
            await student.check()
            assert 0 < student.num_resubmitted <= 48 + 30
        assert redis.xlen(KEYS.requests("math")) == 0
    assert replica.process.poll() is None


async def test_redis_at_its_memory_limit(make_redis: MakeRedis, start_fragile: StartFragile) -> None:
    """Nothing grows beyond it: admission waits, while completions pass and replies arrive."""
    server = make_redis()
    start = start_fragile(server.url, "only", tokens_per_s=400)
    await start.ready()
    with Redis.from_url(server.url) as redis:
        async with student_of(server.url) as student:
            early = student.ask(requests_of(24))
            await until(lambda: redis.xlen(KEYS.requests("math")) + student.num_scored >= 24)
            redis.config_set("maxmemory", int(redis.info("memory")["used_memory"]) // 2)
            late = student.ask(requests_of(8, run="late"))
            async with asyncio.timeout(60):
                await asyncio.gather(*early)
            await asyncio.sleep(0.5)
            assert not any(call.done() for call in late)
            assert redis.xlen(KEYS.requests("math")) == 0, "no late one was admitted"
            redis.config_set("maxmemory", 0)
            await student.check()
    assert start.process.poll() is None


@pytest.mark.parametrize("is_silent", [False, True], ids=["cut", "silent"])
async def test_ten_seconds_without_a_connection(
    make_redis: MakeRedis, start_fragile: StartFragile, is_silent: bool
) -> None:
    """For replica and student alike; leases and heartbeats run out meanwhile."""
    server = make_redis(over_tcp=True)
    relay = Relay(urlsplit(server.url).port or 0)
    await relay.start()
    url = server.url.replace(f":{urlsplit(server.url).port}/", f":{relay.port}/")
    replica = await start_fragile(url, "only", tokens_per_s=400).ready()
    async with student_of(url) as student:
        student.ask(requests_of(60))
        await until(lambda: student.num_scored >= 12)
        if is_silent:
            relay.mute()
        else:
            await relay.cut()
        await asyncio.sleep(CUT_S)
        assert student.num_scored < 60
        await relay.heal()
        await student.check()
        pool = Pool(server.url)
        assert pool.num_entries() == 0 and not pool.redis.exists(KEYS.inflight("math"))
        pool.close()
    await relay.cut()
    assert replica.process.poll() is None
