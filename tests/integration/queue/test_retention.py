"""What Redis keeps of a request, and for how long: the table of docs/operations.md, read off real servers."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from opd.queue.client_rules import ClientRules
from opd.queue.dead_letters import _REQUEUED_BODY_TTL_MS
from opd.queue.keys import PoolKeys
from opd.queue.score_client import QueueScoreClient
from opd.queue.score_consumer import LeaseRules, ScoreConsumer
from tests.conftest import MakeRedis
from tests.integration.queue.test_pool_service import bury_one

KEYS = PoolKeys("qwen")
TIMEOUT_MS = 20_000
SECRET = b"what the prompt said, in token ids"


def ttl_ms(redis: Any, pattern: str) -> int:
    """Of the one key that matches; -1 without expiry."""
    (key,) = redis.keys(pattern)
    return int(redis.pttl(key))


def contents(redis: Any) -> set[str]:
    """The kinds of keys there are: `body` of opd:{qwen}:body:..."""
    return {key.decode().removeprefix(KEYS.prefix).partition(":")[0] for key in redis.keys("*")}


async def test_bodies_and_replies_expire_and_are_gone_once_answered(redis_url: str) -> None:
    client = await QueueScoreClient.connect(redis_url, pool="qwen", tenant="math")
    consumer = await ScoreConsumer.connect(redis_url, pool="qwen", name="one")
    asking = asyncio.create_task(client.score(rollout_id="r.0.0", num_tokens=3, timeout_ms=TIMEOUT_MS, body=SECRET))
    (delivery,) = await consumer.take(token_budget=10, wait_s=5.0)
    with Redis.from_url(redis_url) as redis:
        body_ms, alive_ms = ttl_ms(redis, "*:body:*"), ttl_ms(redis, "*:alive:*")
        assert TIMEOUT_MS < body_ms <= TIMEOUT_MS + ClientRules().heartbeat_ms
        assert 0 < alive_ms <= ClientRules().heartbeat_ms
        assert not any(SECRET in redis.dump(key) for key in redis.keys("*") if b":body:" not in key)
        # The reader is stopped, so that the reply can be looked at before it is fetched.
        for task in client._tasks:
            task.cancel()
        await consumer.complete(delivery, b"scores")
        reply_ms, stream_ms = ttl_ms(redis, "*:reply:*"), ttl_ms(redis, "*:replies:*")
        assert 0 < stream_ms <= LeaseRules().reply_ttl_ms and reply_ms <= LeaseRules().reply_ttl_ms
        assert reply_ms > LeaseRules().reply_ttl_ms - 60_000
        assert "body" not in contents(redis)
        await client._collect(["r.0.0"])
        assert await asking == b"scores" and "reply" not in contents(redis)
        client._fault = None
        await client.close()
        await consumer.close()
        # Numbers and names stay; nothing that a trainer sent does.
        assert contents(redis) <= {"requests", "counters", "deficits", "ring", "active", "wake", "newcomers"}
        assert redis.xlen(KEYS.requests("math")) == 0


async def test_a_dead_letter_keeps_its_body_until_it_is_thrown_away(redis_url: str) -> None:
    await bury_one(redis_url)
    with Redis.from_url(redis_url) as redis:
        assert ttl_ms(redis, "*:body:*") == ttl_ms(redis, "*:dead:*") == -1


async def test_a_rewritten_log_holds_no_answered_request(make_redis: MakeRedis) -> None:
    server = make_redis()
    client = await QueueScoreClient.connect(server.url, pool="qwen", tenant="math")
    consumer = await ScoreConsumer.connect(server.url, pool="qwen", name="one")
    asking = asyncio.create_task(client.score(rollout_id="r.0.0", num_tokens=3, timeout_ms=TIMEOUT_MS, body=SECRET))
    (delivery,) = await consumer.take(token_budget=10, wait_s=5.0)
    await consumer.complete(delivery, b"scores")
    await asking
    await client.close()
    await consumer.close()

    def is_on_disk() -> bool:
        return any(SECRET in path.read_bytes() for path in server.data_dir.rglob("*") if path.is_file())

    with Redis.from_url(server.url) as redis:
        for _ in range(100):
            if is_on_disk():
                break
            await asyncio.sleep(0.1)
        assert is_on_disk(), "the log keeps what was answered until it is rewritten"
        redis.bgrewriteaof()
        for _ in range(200):
            state = redis.info("persistence")
            if not (state["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"]):
                break
            await asyncio.sleep(0.05)
        assert not is_on_disk()


@pytest.mark.parametrize(
    ("row", "milliseconds", "unit_ms"),
    [
        ("a reply that nobody fetched", LeaseRules().reply_ttl_ms, 60_000),
        ("a trainer's heartbeat", ClientRules().heartbeat_ms, 1000),
        ("the body of a requeued dead letter", _REQUEUED_BODY_TTL_MS, 3_600_000),
    ],
)
def test_the_table_says_what_the_code_does(row: str, milliseconds: int, unit_ms: int) -> None:
    text = (Path(__file__).parents[3] / "docs/operations.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row}")]
    assert str(milliseconds // unit_ms) in re.findall(r"\d+", line)
