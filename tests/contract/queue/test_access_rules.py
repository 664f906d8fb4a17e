"""Access rules on real servers: the protocol works under them, and a tenant cannot reach beyond its keys."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from redis import Redis
from redis.exceptions import NoPermissionError

from opd.errors import InvalidRequestError, UnauthenticatedError
from opd.queue.access import acl_file_line, pool_rules, tenant_rules
from opd.queue.keys import PoolKeys
from opd.queue.pools import read_info, resolve_pool
from opd.queue.score_client import QueueScoreClient
from opd.queue.score_consumer import ScoreConsumer

PASSWORD = "a long enough password"
KEYS = PoolKeys("qwen")


def with_user(url: str, name: str, password: str = PASSWORD) -> str:
    return f"{url}&username={name}&password={quote(password)}"


def version_of(redis: Any) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", redis.info("server")["redis_version"])[:2]
    return int(major), int(minor)


@pytest.fixture
def guarded_url(redis_url: str) -> Iterator[str]:
    """A server with two tenants and a pool user."""
    with Redis.from_url(redis_url) as redis:
        version = version_of(redis)
        for tenant in ("math", "code"):
            redis.execute_command("ACL", "SETUSER", tenant, *tenant_rules(tenant, "qwen", PASSWORD, version=version))
        redis.execute_command("ACL", "SETUSER", "pool", *pool_rules("pool", "qwen", PASSWORD))
        yield redis_url
        redis.acl_deluser("math", "code", "pool")


async def test_the_whole_protocol_works_under_the_rules(guarded_url: str) -> None:
    consumer = await ScoreConsumer.connect(with_user(guarded_url, "pool"), pool="qwen", name="one")
    await consumer.set_limits(weights={"math": 2.0}, caps={"math": 1000})
    await consumer.publish_info(b"handshake")
    await consumer.announce(b"me")
    client = await QueueScoreClient.connect(with_user(guarded_url, "math"), pool="qwen", tenant="math")
    assert await resolve_pool(client._connection, "qwen") == "qwen"
    assert await read_info(client._connection, "qwen") == b"handshake"
    asking = [
        asyncio.create_task(client.score(rollout_id=f"r.0.{number}", num_tokens=10, timeout_ms=9000, body=b"b"))
        for number in range(3)
    ]
    (first,) = await consumer.take(token_budget=10, wait_s=5.0)
    await consumer.renew([first])
    await consumer.hand_back([first])
    asking[2].cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking[2]
    await client._reconcile()
    for delivery in await consumer.take(token_budget=100, wait_s=5.0):
        assert await consumer.complete(delivery, b"scores")
    assert await asyncio.gather(*asking[:2]) == [b"scores"] * 2
    await client.close()
    await consumer.close()


@pytest.mark.parametrize(
    "command",
    [
        ("GET", KEYS.reply("code", "00ff", "r.0")),
        ("SET", KEYS.reply("code", "00ff", "r.0"), "forged"),
        ("XADD", KEYS.requests("code"), "*", "r", "r.0"),
        ("DEL", KEYS.requests("code")),
        ("XRANGE", KEYS.dead("math"), "-", "+"),
        ("HSET", KEYS.deficits, "math", "1e9"),
        ("SET", "anything", "1"),
        ("KEYS", "*"),
        ("SCAN", "0"),
        ("FLUSHALL",),
        ("CONFIG", "GET", "maxmemory"),
        ("XGROUP", "DESTROY", KEYS.requests("math"), "pool"),
        ("XACK", KEYS.requests("math"), "pool", "1-0"),
        ("XREADGROUP", "GROUP", "pool", "me", "STREAMS", KEYS.requests("math"), ">"),
        ("EVAL", "return redis.call('GET', ARGV[1])", "0", KEYS.body("code", "00ff", "r.0")),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_tenant_cannot_reach_beyond_its_keys(guarded_url: str, command: tuple[str, ...]) -> None:
    with (
        Redis.from_url(with_user(guarded_url, "math")) as redis,
        pytest.raises(Exception, match=r"(?i)no permissions|can't run this command|access.*key|ACL failure") as raised,
    ):
        redis.execute_command(*command)
    assert isinstance(raised.value, NoPermissionError) or command[0] == "EVAL"


def test_on_seven_a_tenant_cannot_lift_its_own_cap(guarded_url: str) -> None:
    with Redis.from_url(guarded_url) as admin, Redis.from_url(with_user(guarded_url, "math")) as redis:
        if version_of(admin) < (7, 0):
            # 6.2 cannot tell reading from writing: this is the documented gap between the two.
            redis.hset(KEYS.limits, "cap:math", 10**9)
            return
        with pytest.raises(NoPermissionError):
            redis.hset(KEYS.limits, "cap:math", 10**9)


def test_a_pool_touches_no_other_pool_and_no_settings(guarded_url: str) -> None:
    with Redis.from_url(with_user(guarded_url, "pool")) as redis:
        for command in (("GET", PoolKeys("other").info), ("FLUSHALL",), ("CONFIG", "GET", "*")):
            with pytest.raises(NoPermissionError):
                redis.execute_command(*command)


async def test_a_wrong_password_is_refused(guarded_url: str) -> None:
    with pytest.raises(UnauthenticatedError):
        await QueueScoreClient.connect(with_user(guarded_url, "math", "wrong"), pool="qwen", tenant="math")


def test_a_rendered_file_is_one_the_server_reads(make_redis: Any, tmp_path: Any) -> None:
    lines = [
        acl_file_line("default", ["on", "nopass", "~*", "+@all"]),
        acl_file_line("math", tenant_rules("math", "qwen@00ff", PASSWORD, version=(6, 2))),
    ]
    (tmp_path / "users.acl").write_text("\n".join(lines) + "\n")
    server = make_redis(f'aclfile "{tmp_path / "users.acl"}"')
    with Redis.from_url(with_user(server.url, "math")) as redis:
        assert redis.ping()


def test_no_rule_holds_the_password_and_short_ones_are_refused() -> None:
    rules = tenant_rules("math", "qwen", PASSWORD, version=(7, 0))
    assert not any(PASSWORD in rule for rule in rules)
    with pytest.raises(InvalidRequestError, match="password of math: has 5 characters"):
        tenant_rules("math", "qwen", "short", version=(7, 0))
