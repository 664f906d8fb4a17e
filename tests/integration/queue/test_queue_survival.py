"""Replicas are killed, Redis is killed and loses its data: every reply arrives, and arrives once."""

import asyncio
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from opd.errors import DeadLetterError
from opd.queue.client_rules import ClientRules
from opd.queue.score_client import QueueScoreClient

RULES = ClientRules(heartbeat_ms=10_000, sweep_s=0.5)


async def connect(url: str, tenant: str = "math") -> QueueScoreClient:
    return await QueueScoreClient.connect(url, pool="qwen", tenant=tenant, rules=RULES, patience_s=20.0)


def send(client: QueueScoreClient, count: int, *, tokens: int = 50) -> list["asyncio.Task[bytes]"]:
    return [
        asyncio.create_task(
            client.score(rollout_id=f"run.0.{number}", num_tokens=tokens, timeout_ms=30_000, body=b"body %d" % number)
        )
        for number in range(count)
    ]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def until_scored(client: QueueScoreClient, count: int) -> None:
    await until(lambda: client.stats.scored >= count)


def expected(count: int) -> list[bytes]:
    return [(b"body %d" % number)[::-1] for number in range(count)]


async def test_a_killed_replica_costs_no_reply(redis_url: str, start_replica: Any) -> None:
    victim = start_replica(redis_url, "victim", delay_s=0.02)
    start_replica(redis_url, "other", delay_s=0.002)
    client = await connect(redis_url)
    tasks = send(client, 80)
    await until_scored(client, 15)
    victim.kill()
    assert await asyncio.gather(*tasks) == expected(80)
    assert (client.stats.sent, client.stats.scored, client.stats.failed) == (80, 80, 0)
    assert (client.stats.duplicates, client.stats.resubmitted) == (0, 0)
    await client.close()


async def test_redis_killed_and_restarted_with_its_log(make_redis: Any, start_replica: Any) -> None:
    server = make_redis("appendfsync always")
    start_replica(server.url, "one", delay_s=0.002)
    client = await connect(server.url)
    tasks = send(client, 60)
    await until_scored(client, 15)
    server.kill()
    server.start()
    assert await asyncio.gather(*tasks) == expected(60)
    assert (client.stats.scored, client.stats.failed, client.stats.resubmitted) == (60, 0, 0)
    await client.close()


async def test_redis_killed_and_restarted_empty(make_redis: Any, start_replica: Any) -> None:
    server = make_redis()
    start_replica(server.url, "one", delay_s=0.002)
    client = await connect(server.url)
    tasks = send(client, 60)
    await until_scored(client, 15)
    server.kill()
    for found in server.data_dir.iterdir():
        shutil.rmtree(found) if found.is_dir() else found.unlink()
    server.start()
    assert await asyncio.gather(*tasks) == expected(60)
    assert (client.stats.scored, client.stats.failed) == (60, 0)
    assert 0 < client.stats.resubmitted <= 45
    await client.close()


async def test_a_flush_nobody_announced_is_noticed(make_redis: Any, start_replica: Any) -> None:
    server = make_redis()
    client = await connect(server.url)
    tasks = send(client, 30)
    await until(lambda: all(item.is_admitted for item in client._open.values()) and client.num_open == 30)
    await client._connection.call(lambda redis: redis.flushall())
    start_replica(server.url, "one")
    assert await asyncio.gather(*tasks) == expected(30)
    assert client.stats.resubmitted == 30
    await client.close()


async def test_a_poison_request_ends_as_a_dead_letter_alone(redis_url: str, start_replica: Any) -> None:
    client = await connect(redis_url)
    poison = asyncio.create_task(client.score(rollout_id="run.0.p", num_tokens=50, timeout_ms=30_000, body=b"poison"))
    tasks = send(client, 6)
    await asyncio.sleep(0.1)
    for life in range(4):
        replica = start_replica(redis_url, f"life{life}", lease_ms=200)
        await until(lambda replica=replica: replica.poll() is not None or poison.done())
    with pytest.raises(DeadLetterError, match=r"rollout_id=run.0.p: put aside after 3 deliveries"):
        await poison
    assert await asyncio.gather(*tasks) == expected(6)
    await client.close()


async def test_a_small_tenant_does_not_wait_behind_a_hog(redis_url: str, start_replica: Any) -> None:
    hog, small = await connect(redis_url, "hog"), await connect(redis_url, "small")
    hog_tasks = send(hog, 150, tokens=100)
    await asyncio.sleep(0.3)
    start_replica(redis_url, "one", delay_s=0.002)
    await until_scored(hog, 20)
    before = hog.stats.scored
    assert await asyncio.gather(*send(small, 10, tokens=100)) == expected(10)
    # With equal weights the hog gets about as much as the small one, and one batch may be under way already.
    assert hog.stats.scored - before <= 60
    assert await asyncio.gather(*hog_tasks) == expected(150)
    await hog.close()
    await small.close()
