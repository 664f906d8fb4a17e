"""The replica's side against a real Redis: waiting, cancelling, suspects, handing back, signing on and off."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis import Redis

from opd.errors import InvalidRequestError, QueueUnavailableError, TeacherUnavailableError
from opd.queue.connection import QueueConnection
from opd.queue.keys import PoolKeys
from opd.queue.pools import promote_pool, read_info, resolve_pool
from opd.queue.score_client import QueueScoreClient
from opd.queue.score_consumer import LeaseRules, ScoreConsumer
from opd.queue.status import read_status

KEYS = PoolKeys("qwen")
QUICK = LeaseRules(lease_ms=150, poll_s=0.02)


async def connect(url: str, name: str, rules: LeaseRules = QUICK) -> ScoreConsumer:
    return await ScoreConsumer.connect(url, pool="qwen", name=name, rules=rules, patience_s=1.0)


@pytest.fixture
async def consumer(redis_url: str) -> AsyncIterator[ScoreConsumer]:
    found = await connect(redis_url, "one")
    yield found
    await found.close()


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[QueueScoreClient]:
    found = await QueueScoreClient.connect(redis_url, pool="qwen", tenant="math")
    yield found
    await found.close()


async def send(client: QueueScoreClient, count: int, *, first: int = 0) -> list["asyncio.Task[bytes]"]:
    """Starts so many requests of 10 tokens and waits until all of them are queued."""
    tasks = [
        asyncio.create_task(client.score(rollout_id=f"r.0.{number}", num_tokens=10, timeout_ms=20_000, body=b"b"))
        for number in range(first, first + count)
    ]
    async with asyncio.timeout(5):
        while not all(item.is_admitted for item in client._open.values()) or client.num_open < count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return tasks


async def test_taking_waits_for_work_and_no_longer(consumer: ScoreConsumer, client: QueueScoreClient) -> None:
    began = time.monotonic()
    assert await consumer.take(token_budget=100, wait_s=0.2) == []
    assert 0.15 < time.monotonic() - began < 1.5
    taking = asyncio.create_task(consumer.take(token_budget=100, wait_s=10.0))
    await asyncio.sleep(0.05)
    (asking,) = await send(client, 1)
    (delivery,) = await taking
    assert (delivery.rollout_id, delivery.tenant, delivery.num_tokens, delivery.body) == ("r.0.0", "math", 10, b"b")
    assert await consumer.complete(delivery, b"scores")
    assert await asking == b"scores"
    assert consumer.held == ()


async def test_a_wake_up_is_passed_on_to_the_next_replica(
    redis_url: str, consumer: ScoreConsumer, client: QueueScoreClient
) -> None:
    slow = LeaseRules(poll_s=1.0)
    others = [await connect(redis_url, f"other{number}", slow) for number in range(3)]
    taking = [asyncio.create_task(other.take(token_budget=100, max_entries=1, wait_s=5.0)) for other in others]
    await asyncio.sleep(0.2)
    began = time.monotonic()
    tasks = await send(client, 3)
    for other, task in zip(others, taking, strict=True):
        for delivery in await task:
            await other.complete(delivery, b"scores")
    assert await asyncio.gather(*tasks) == [b"scores"] * 3
    assert time.monotonic() - began < 0.9
    for other in others:
        await other.close()


@pytest.mark.parametrize("delay_s", [0.0, 0.0005, 0.001, 0.002, 0.005])
async def test_a_cancelled_take_holds_nothing(
    redis_url: str, consumer: ScoreConsumer, client: QueueScoreClient, delay_s: float
) -> None:
    tasks = await send(client, 5)
    taking = asyncio.create_task(consumer.take(token_budget=1000))
    await asyncio.sleep(delay_s)
    was_done = taking.done()
    taking.cancel()
    if not was_done:
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert consumer.held == ()
    await consumer.hand_back(consumer.held)
    other = await connect(redis_url, "two")
    deliveries = await other.take(token_budget=1000)
    assert [delivery.delivery_count for delivery in deliveries] == [1] * 5
    for delivery in deliveries:
        await other.complete(delivery, b"scores")
    await asyncio.gather(*tasks)
    await other.close()


async def test_renewed_leases_outlast_their_time(
    redis_url: str, consumer: ScoreConsumer, client: QueueScoreClient
) -> None:
    (asking,) = await send(client, 1)
    (delivery,) = await consumer.take(token_budget=100)
    other = await connect(redis_url, "two")
    for _ in range(6):
        await asyncio.sleep(0.05)
        assert await consumer.renew([delivery]) == []
        assert await other.take(token_budget=100, wait_s=0) == []
    assert await consumer.complete(delivery, b"scores")
    assert await asking == b"scores"
    await other.close()


async def test_a_lost_lease_is_told_and_the_late_answer_changes_nothing(
    redis_url: str, consumer: ScoreConsumer, client: QueueScoreClient
) -> None:
    (asking,) = await send(client, 1)
    (late,) = await consumer.take(token_budget=100)
    other = await connect(redis_url, "two", LeaseRules(lease_ms=150, poll_s=0.02))
    (again,) = await other.take(token_budget=100, wait_s=5.0)
    assert again.delivery_count == 2
    assert await consumer.renew([late]) == [late]
    assert consumer.held == ()
    assert not await consumer.complete(late, b"late")
    assert await other.complete(again, b"scores")
    assert await asking == b"scores"
    await other.close()


async def test_while_a_suspect_is_held_nothing_else_is_taken(
    redis_url: str, consumer: ScoreConsumer, client: QueueScoreClient
) -> None:
    first = await send(client, 1)
    await consumer.take(token_budget=100)
    other = await connect(redis_url, "two", LeaseRules(lease_ms=150, poll_s=0.02))
    (suspect,) = await other.take(token_budget=100, wait_s=5.0)
    assert suspect.delivery_count == 2
    more = asyncio.create_task(send(client, 2, first=1))
    await asyncio.sleep(0.1)
    await other.renew([suspect])
    assert await other.take(token_budget=100, wait_s=0.05) == []
    taking = asyncio.create_task(other.take(token_budget=100, wait_s=5.0))
    await asyncio.sleep(0.02)
    await other.complete(suspect, b"scores")
    deliveries = await taking
    assert [delivery.rollout_id for delivery in deliveries] == ["r.0.1", "r.0.2"]
    for delivery in deliveries:
        await other.complete(delivery, b"scores")
    assert await asyncio.gather(*first, *await more) == [b"scores"] * 3
    await other.close()


async def test_closing_hands_back_and_signs_off(redis_url: str, client: QueueScoreClient) -> None:
    consumer = await connect(redis_url, "leaving", LeaseRules(lease_ms=60_000))
    await consumer.announce(b"me")
    tasks = await send(client, 2)
    await consumer.take(token_budget=100)
    await consumer.close()
    other = await connect(redis_url, "two")
    deliveries = await other.take(token_budget=100)
    assert [delivery.delivery_count for delivery in deliveries] == [1, 1]
    with Redis.from_url(redis_url) as redis:
        assert redis.keys(KEYS.prefix + "replica*") == []
    for delivery in deliveries:
        await other.complete(delivery, b"scores")
    await asyncio.gather(*tasks)
    await other.close()


async def test_the_status_tells_of_backlog_leases_and_replicas(
    redis_url: str, consumer: ScoreConsumer, client: QueueScoreClient
) -> None:
    await consumer.set_limits(weights={"math": 2.0}, caps={}, default_cap=5000)
    await consumer.announce(b"me", expiry_s=30.0)
    await consumer._connection.call(lambda redis: redis.sadd(KEYS.replicas, "long-gone"))
    tasks = await send(client, 3)
    deliveries = await consumer.take(token_budget=10)
    status = await read_status(consumer._connection, "qwen")
    (tenant,) = status.tenants
    assert (status.backlog_tokens, status.backlog_entries, status.leased_entries) == (30, 3, 1)
    assert (tenant.tenant, tenant.weight, tenant.cap_tokens, tenant.dead_letters) == ("math", 2.0, 5000, 0)
    assert 0.0 <= status.oldest_age_s < 5.0
    assert [replica.replica_id for replica in status.replicas] == ["one"]
    assert status.totals == {"delivered": 1}
    with Redis.from_url(redis_url) as redis:
        assert redis.smembers(KEYS.replicas) == {b"one"}
    deliveries += await consumer.take(token_budget=100)
    for delivery in deliveries:
        await consumer.complete(delivery, b"scores")
    await asyncio.gather(*tasks)
    status = await read_status(consumer._connection, "qwen")
    assert (status.backlog_tokens, status.oldest_age_s) == (0, 0.0)
    assert status.totals == {"completed": 3, "completed_tokens": 30, "delivered": 3}


async def test_an_unused_pool_has_a_status_too(consumer: ScoreConsumer) -> None:
    status = await read_status(consumer._connection, "empty")
    assert (status.tenants, status.replicas, status.totals, status.backlog_tokens) == ((), (), {}, 0)


async def test_the_handshake_outlives_its_replica_and_an_alias_leads_to_it(
    redis_url: str, consumer: ScoreConsumer
) -> None:
    connection = QueueConnection(redis_url)
    with pytest.raises(TeacherUnavailableError, match="teacher=qwen: no replica ever announced itself"):
        await read_info(connection, "qwen")
    await consumer.publish_info(b"handshake")
    assert await read_info(connection, "qwen") == b"handshake"
    with pytest.raises(TeacherUnavailableError):
        await promote_pool(connection, "qwen", "qwen@00ff", is_forced=True)
    assert await promote_pool(connection, "qwen", "qwen", is_forced=True) is None
    assert await promote_pool(connection, "qwen", "qwen", is_forced=True) == "qwen"
    assert await resolve_pool(connection, "qwen") == "qwen"
    assert await resolve_pool(connection, "other") == "other"
    await connection.close()


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e6])
async def test_weights_are_checked(consumer: ScoreConsumer, weight: float) -> None:
    with pytest.raises(InvalidRequestError, match="weight of tenant math"):
        await consumer.set_limits(weights={"math": weight}, caps={})


async def test_limits_are_replaced_as_a_whole(redis_url: str, consumer: ScoreConsumer) -> None:
    await consumer.set_limits(weights={"math": 2.0}, caps={"math": 10})
    await consumer.set_limits(weights={}, caps={"code": 20})
    with Redis.from_url(redis_url) as redis:
        assert redis.hgetall(KEYS.limits) == {b"cap:code": b"20"}


async def test_patience_ends_for_a_replica_too(make_redis: Any) -> None:
    server = make_redis()
    consumer = await ScoreConsumer.connect(server.url, pool="qwen", name="one", patience_s=0.3)
    server.kill()
    with pytest.raises(QueueUnavailableError, match=r"not reachable for 0.3 s"):
        await consumer.take(token_budget=100)
    server.start()
    assert await consumer.take(token_budget=100, wait_s=0) == []
    await consumer.close()


async def test_an_answer_that_redis_could_not_take_leaves_nothing_on_our_books(make_redis: Any) -> None:
    """Or this replica would never be given the suspect that the request has become, and wait for itself for ever."""
    server = make_redis("appendfsync always")
    one = await connect(server.url, "one")
    client = await QueueScoreClient.connect(server.url, pool="qwen", tenant="math")
    tasks = await send(client, 2)
    first, second = await one.take(token_budget=100)
    server.kill()
    with pytest.raises(QueueUnavailableError):
        await one.complete(first, b"scores")
    with pytest.raises(QueueUnavailableError):
        await one.hand_back([second])
    assert one.held == ()
    server.start()
    answered = 0
    async with asyncio.timeout(20):
        while answered < 2:
            for delivery in await one.take(token_budget=100, wait_s=0.2):
                answered += await one.complete(delivery, b"scores")
    assert await asyncio.gather(*tasks) == [b"scores", b"scores"]
    await client.close()
    await one.close()


async def test_what_direct_callers_had_is_charged_by_a_take_that_leases_and_by_no_other(
    redis_url: str, client: QueueScoreClient
) -> None:
    one, two = await connect(redis_url, "one"), await connect(redis_url, "two")
    (task,) = await send(client, 1)
    await one.take(token_budget=100)
    await asyncio.sleep(0.3)
    # The lapsed one comes alone, so nothing else is looked at.
    (suspect,) = await two.take(token_budget=100, wait_s=1.0, spent_directly={"math": 500})
    assert suspect.delivery_count == 2
    assert await two.complete(suspect, b"scores") and await task == b"scores"
    with Redis.from_url(redis_url) as redis:
        before = float(redis.hget(KEYS.deficits, "math") or 0)
        (task,) = await send(client, 1, first=1)
        (delivery,) = await two.take(token_budget=10_000, wait_s=1.0)
        assert float(redis.hget(KEYS.deficits, "math")) <= before + QUICK.quantum_tokens - 500
    assert await two.complete(delivery, b"scores") and await task == b"scores"
    await two.close()
    await one.close()
