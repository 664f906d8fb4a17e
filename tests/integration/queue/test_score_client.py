"""The client against a real Redis and an in-process replica: pacing, deadlines, errors, closing."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis import Redis

from opd.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    LostRequestError,
    NonFiniteError,
    OpdError,
    OverCapacityError,
    QueueUnavailableError,
    TeacherUnavailableError,
)
from opd.queue.client_rules import ClientRules
from opd.queue.keys import PoolKeys
from opd.queue.score_client import QueueScoreClient
from opd.queue.score_consumer import LeaseRules, ScoreConsumer

KEYS = PoolKeys("qwen")


class Replica:
    """Answers with the body, unless `refusals` holds an error for it."""

    def __init__(self, consumer: ScoreConsumer) -> None:
        self.consumer = consumer
        self.refusals: list[OpdError] = []
        self.attempts: list[int] = []
        self.delay_s = 0.0

    async def serve(self) -> None:
        while True:
            for delivery in await self.consumer.take(token_budget=1000, wait_s=0.5):
                self.attempts.append(delivery.attempt)
                await asyncio.sleep(self.delay_s)
                if self.refusals:
                    await self.consumer.fail(delivery, self.refusals.pop(0))
                else:
                    await self.consumer.complete(delivery, delivery.body)


@pytest.fixture
async def consumer(redis_url: str) -> AsyncIterator[ScoreConsumer]:
    found = await ScoreConsumer.connect(redis_url, pool="qwen", name="one", rules=LeaseRules(poll_s=0.05))
    yield found
    await found.close()


@pytest.fixture
async def replica(consumer: ScoreConsumer) -> AsyncIterator[Replica]:
    found = Replica(consumer)
    task = asyncio.create_task(found.serve())
    yield found
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def connect(url: str, **rules: Any) -> QueueScoreClient:
    return await QueueScoreClient.connect(url, pool="qwen", tenant="math", rules=ClientRules(**rules), patience_s=5.0)


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[QueueScoreClient]:
    found = await connect(redis_url)
    yield found
    await found.close()


def ask(client: QueueScoreClient, number: int = 0, *, tokens: int = 10, timeout_ms: int = 20_000) -> Any:
    return client.score(rollout_id=f"r.0.{number}", num_tokens=tokens, timeout_ms=timeout_ms, body=b"body %d" % number)


async def test_replies_reach_their_callers_and_nothing_is_left(
    redis_url: str, client: QueueScoreClient, replica: Replica
) -> None:
    replies = await asyncio.gather(*(ask(client, number) for number in range(50)))
    assert replies == [b"body %d" % number for number in range(50)]
    await client.close()
    await asyncio.sleep(0.2)
    with Redis.from_url(redis_url) as redis:
        names = {key.decode().removeprefix(KEYS.prefix) for key in redis.keys("*")}
    assert names == {"counters", "ring"}


async def test_a_refusal_is_raised_and_not_tried_again(client: QueueScoreClient, replica: Replica) -> None:
    replica.refusals = [NonFiniteError("rollout_id=r.0.0: NaN in row 3")]
    with pytest.raises(NonFiniteError, match="NaN in row 3"):
        await ask(client)
    assert (client.stats.failed, client.stats.resubmitted) == (1, 0)
    assert await ask(client) == b"body 0"


async def test_a_retryable_refusal_is_submitted_again(client: QueueScoreClient, replica: Replica) -> None:
    replica.refusals = [TeacherUnavailableError("going down"), OverCapacityError("full", retry_after_s=0.05)]
    assert await ask(client) == b"body 0"
    assert replica.attempts == [0, 1, 2]
    assert (client.stats.scored, client.stats.resubmitted, client.stats.failed) == (1, 2, 0)


async def test_attempts_are_bounded(redis_url: str, replica: Replica) -> None:
    client = await connect(redis_url, max_attempts=3)
    replica.refusals = [TeacherUnavailableError(f"refusal {number}") for number in range(5)]
    with pytest.raises(TeacherUnavailableError, match="refusal 2"):
        await ask(client)
    assert replica.attempts == [0, 1, 2]
    await client.close()


async def test_a_lost_body_is_submitted_again(
    redis_url: str, client: QueueScoreClient, consumer: ScoreConsumer
) -> None:
    asking = asyncio.create_task(ask(client))
    await asyncio.sleep(0.1)
    with Redis.from_url(redis_url) as redis:
        assert redis.delete(KEYS.body("math", client.incarnation, "r.0.0")) == 1
    assert await consumer.take(token_budget=100, wait_s=0) == []
    deliveries = await consumer.take(token_budget=100, wait_s=5.0)
    assert [delivery.attempt for delivery in deliveries] == [1]
    await consumer.complete(deliveries[0], b"scores")
    assert await asking == b"scores"


async def test_a_body_above_the_replicas_limit_never_reaches_the_engine(
    redis_url: str, client: QueueScoreClient
) -> None:
    rules = LeaseRules(max_body_bytes=3)
    consumer = await ScoreConsumer.connect(redis_url, pool="qwen", name="tight", rules=rules)
    asking = asyncio.create_task(ask(client))
    assert await consumer.take(token_budget=100, wait_s=0.3) == []
    with pytest.raises(InvalidRequestError, match="body of 6 bytes is above the limit of 3"):
        await asking
    assert consumer.held == ()
    await consumer.close()


async def test_a_body_above_the_clients_limit_is_not_sent(redis_url: str) -> None:
    client = await connect(redis_url, max_body_bytes=3)
    with pytest.raises(InvalidRequestError, match="body of 6 bytes is above the limit of 3"):
        await ask(client)
    await client.close()


async def test_a_reply_above_the_clients_limit_is_not_fetched(redis_url: str, replica: Replica) -> None:
    client = await connect(redis_url, max_reply_bytes=5)
    with pytest.raises(InvalidRequestError, match=r"reply of \d+ bytes is above the limit of 5"):
        await ask(client)
    await client.close()


async def test_the_cap_paces_and_nothing_overtakes(
    redis_url: str, client: QueueScoreClient, consumer: ScoreConsumer, replica: Replica
) -> None:
    await consumer.set_limits(weights={}, caps={"math": 30})
    order: list[int] = []

    async def one(number: int) -> None:
        await ask(client, number)
        order.append(number)

    replica.delay_s = 0.001
    await asyncio.gather(*(one(number) for number in range(30)))
    assert order == sorted(order)
    assert client.stats.scored == 30


async def test_a_request_above_the_whole_cap_is_refused_at_once(
    client: QueueScoreClient, consumer: ScoreConsumer
) -> None:
    await consumer.set_limits(weights={}, caps={}, default_cap=30)
    with pytest.raises(InvalidRequestError, match="31 tokens are above the tenant's cap of 30 in flight"):
        await ask(client, tokens=31)


async def test_waiting_for_room_is_bounded(redis_url: str, consumer: ScoreConsumer) -> None:
    client = await connect(redis_url, admission_timeout_s=0.2)
    await consumer.set_limits(weights={}, caps={"math": 10})
    first = asyncio.create_task(ask(client, 0))
    await asyncio.sleep(0.1)
    with pytest.raises(OverCapacityError, match=r"not admitted for 0.2 s \(over_cap: 10 of 10\)"):
        await ask(client, 1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await client.close()


async def test_full_memory_holds_back_until_it_is_freed(
    redis_url: str, client: QueueScoreClient, replica: Replica
) -> None:
    with Redis.from_url(redis_url) as redis:
        redis.config_set("maxmemory", redis.info("memory")["used_memory"] + 100_000)
        asking = asyncio.create_task(ask(client))
        await asyncio.sleep(0.3)
        assert not asking.done()
        redis.config_set("maxmemory", 0)
    assert await asking == b"body 0"


async def test_without_a_replica_the_time_out_ends_it_and_frees_the_cap(redis_url: str) -> None:
    client = await connect(redis_url, deadline_grace_s=0.05)
    with pytest.raises(DeadlineExceededError, match=r"no reply within timeout_ms=100"):
        await ask(client, timeout_ms=100)
    with Redis.from_url(redis_url) as redis:
        assert not redis.exists(KEYS.inflight("math"), KEYS.entry("math"))
    assert client.num_open == 0
    await client.close()


async def test_the_queue_tells_of_a_passed_deadline(
    redis_url: str, client: QueueScoreClient, consumer: ScoreConsumer
) -> None:
    asking = asyncio.create_task(ask(client, timeout_ms=50))
    await asyncio.sleep(0.2)
    assert await consumer.take(token_budget=100, wait_s=0) == []
    with pytest.raises(DeadlineExceededError, match=r"timeout_ms=50: passed before a replica was free"):
        await asking


async def test_cancelling_takes_the_request_back(redis_url: str, client: QueueScoreClient) -> None:
    asking = asyncio.create_task(ask(client))
    await asyncio.sleep(0.1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    with Redis.from_url(redis_url) as redis:
        assert redis.xlen(KEYS.requests("math")) == 0
        assert not redis.exists(KEYS.inflight("math"))


async def test_closing_answers_whoever_waits(redis_url: str, consumer: ScoreConsumer) -> None:
    client = await connect(redis_url)
    await consumer.set_limits(weights={}, caps={"math": 10})
    waiting = [asyncio.create_task(ask(client, number)) for number in range(3)]
    await asyncio.sleep(0.1)
    await client.close()
    for task in waiting:
        with pytest.raises(QueueUnavailableError, match="was closed while requests waited"):
            await task
    with pytest.raises(QueueUnavailableError):
        await ask(client, 9)
    with Redis.from_url(redis_url) as redis:
        names = {key.decode().removeprefix(KEYS.prefix) for key in redis.keys("*")}
    assert names <= {"active", "newcomers", "wake", "requests:math", "limits"}


async def test_an_id_is_used_once_at_a_time(client: QueueScoreClient) -> None:
    asking = asyncio.create_task(ask(client))
    await asyncio.sleep(0.05)
    with pytest.raises(InvalidRequestError, match=r"rollout_id=r.0.0: is being scored already"):
        await ask(client)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_a_reply_that_comes_twice_counts_once(redis_url: str, client: QueueScoreClient, replica: Replica) -> None:
    assert await ask(client) == b"body 0"
    with Redis.from_url(redis_url) as redis:
        redis.set(KEYS.reply("math", client.incarnation, "r.0.0"), b"ok\n\nagain")
        for _ in range(2):
            redis.xadd(KEYS.replies("math", client.incarnation), {"r": "r.0.0", "s": "ok"})
        await asyncio.sleep(0.2)
        assert not redis.exists(KEYS.reply("math", client.incarnation, "r.0.0"))
        assert redis.xlen(KEYS.replies("math", client.incarnation)) == 0
    assert (client.stats.scored, client.stats.duplicates) == (1, 1)


async def test_a_lost_announcement_is_made_up_for(redis_url: str, consumer: ScoreConsumer) -> None:
    client = await connect(redis_url, sweep_s=0.3)
    asking = asyncio.create_task(ask(client))
    (delivery,) = await consumer.take(token_budget=100, wait_s=2.0)
    with Redis.from_url(redis_url) as redis:
        redis.set(KEYS.reply("math", client.incarnation, "r.0.0"), b"ok\n\nscores")
    assert await asking == b"scores"
    assert await consumer.complete(delivery, b"again")
    await client.close()


async def test_a_lapsed_heartbeat_loses_nothing(redis_url: str, replica: Replica) -> None:
    client = await connect(redis_url, heartbeat_ms=400)
    with Redis.from_url(redis_url) as redis:
        redis.delete(KEYS.alive("math", client.incarnation))
        assert await ask(client) == b"body 0"
        assert redis.exists(KEYS.alive("math", client.incarnation))
    await client.close()


async def test_a_stalled_trainers_dropped_requests_are_submitted_again(redis_url: str, consumer: ScoreConsumer) -> None:
    client = await connect(redis_url, heartbeat_ms=1000)
    asking = asyncio.create_task(ask(client))
    await asyncio.sleep(0.05)
    with Redis.from_url(redis_url) as redis:
        redis.delete(KEYS.alive("math", client.incarnation))
    assert await consumer.take(token_budget=100, wait_s=0) == []
    (delivery,) = await consumer.take(token_budget=100, wait_s=5.0)
    await consumer.complete(delivery, b"scores")
    assert await asking == b"scores"
    assert client.stats.resubmitted == 1
    await client.close()


async def test_redis_gone_for_longer_than_the_patience_fails_everybody(make_redis: Any) -> None:
    server = make_redis()
    client = await QueueScoreClient.connect(server.url, pool="qwen", tenant="math", patience_s=0.4)
    asking = asyncio.create_task(ask(client))
    await asyncio.sleep(0.1)
    server.kill()
    began = time.monotonic()
    with pytest.raises(QueueUnavailableError, match=r"not reachable for 0.4 s"):
        await asking
    with pytest.raises(QueueUnavailableError):
        await ask(client, 1)
    await client.close()
    assert time.monotonic() - began < 5.0


def test_lost_requests_are_retryable_and_deadlines_are_not() -> None:
    assert LostRequestError.retryable
    assert not DeadlineExceededError.retryable
