"""Access rules on real servers: the protocol works under them, and a tenant cannot reach beyond its keys."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from redis import Redis
from redis.exceptions import NoPermissionError, RedisError

from opd.errors import InvalidRequestError, UnauthenticatedError
from opd.queue.access import acl_file_line, apply_users, hash_password, pool_rules, read_version, tenant_rules
from opd.queue.connection import QueueConnection
from opd.queue.keys import PoolKeys
from opd.queue.pools import read_info, resolve_pool
from opd.queue.score_client import QueueScoreClient
from opd.queue.score_consumer import ScoreConsumer

PASSWORD = "a long enough password"
HASH = hash_password("math", PASSWORD)
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
            redis.execute_command("ACL", "SETUSER", tenant, *tenant_rules(tenant, ["qwen"], [HASH], version=version))
        redis.execute_command("ACL", "SETUSER", "pool", *pool_rules(["qwen"], [HASH]))
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
        acl_file_line("math", tenant_rules("math", ["qwen@00ff"], [HASH], version=(6, 2))),
    ]
    (tmp_path / "users.acl").write_text("\n".join(lines) + "\n")
    server = make_redis(f'aclfile "{tmp_path / "users.acl"}"')
    with Redis.from_url(with_user(server.url, "math")) as redis:
        assert redis.ping()


def test_no_rule_holds_the_password_and_short_ones_are_refused() -> None:
    rules = tenant_rules("math", ["qwen"], [HASH], version=(7, 0))
    assert not any(PASSWORD in rule for rule in rules) and f"#{HASH}" in rules
    with pytest.raises(InvalidRequestError, match="password of math: has 5 characters"):
        hash_password("math", "short")


@pytest.mark.parametrize("name", ["*", "ma*h", "m?th", "[a-z]", "math ~*", "Math", "", "a" * 64, "..", "a:b", "a\n"])
def test_names_that_stand_for_more_than_themselves_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="must match"):
        tenant_rules(name, ["qwen"], [HASH], version=(7, 0))
    with pytest.raises(InvalidRequestError, match="must match"):
        tenant_rules("math", [name], [HASH], version=(7, 0))


async def test_users_of_a_running_redis_follow_the_table(redis_url: str) -> None:
    connection = QueueConnection(redis_url)
    version = await read_version(connection)
    pools, other_hash = ["qwen", "llama"], "0" * 64
    rules = {name: tenant_rules(name, pools, [HASH], version=version) for name in ("math", "code")}
    with Redis.from_url(redis_url) as admin:
        admin.execute_command("ACL", "SETUSER", "bystander", "on", "nopass", "~app:*", "+get")
        assert await apply_users(connection, rules, pools) == ([], False)
        code = Redis.from_url(with_user(redis_url, "code"))
        assert code.ping() and code.get(PoolKeys("llama").info) is None
        rotating = {"math": tenant_rules("math", pools, [other_hash, HASH], version=version)}
        assert await apply_users(connection, rotating, pools) == (["code"], False)
        with pytest.raises(RedisError):
            code.ping()
        code.close()
        with Redis.from_url(with_user(redis_url, "math")) as math:
            assert math.ping()
        dropped = {"math": tenant_rules("math", pools, [other_hash], version=version)}
        await apply_users(connection, dropped, pools)
        with Redis.from_url(with_user(redis_url, "math")) as math, pytest.raises(RedisError):
            math.ping()
        assert "bystander" in admin.acl_users()
        admin.acl_deluser("bystander", "math")
    await connection.close()
