"""Opening and losing Redis: what is refused, how it is named, and that no password is shown."""

import asyncio
import socket
import time
from typing import Any
from urllib.parse import quote

import pytest
from redis import Redis

from opd.credentials import Credentials
from opd.errors import (
    ConfigError,
    InternalError,
    PermissionDeniedError,
    QueueMisconfiguredError,
    QueueUnavailableError,
    UnauthenticatedError,
)
from opd.queue.connection import QueueConnection, hide_password, split_url, without_identity


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:secret@host:1/0", "redis://:***@host:1/0"),
        ("rediss://me:secret@host:1/0?x=1", "rediss://me:***@host:1/0?x=1"),
        ("unix:///tmp/redis.sock?db=0", "unix:///tmp/redis.sock?db=0"),
        ("unix:///tmp/redis.sock?db=0&password=secret", "unix:///tmp/redis.sock?db=0&password=***"),
    ],
)
def test_passwords_are_hidden(url: str, shown: str) -> None:
    assert hide_password(url) == shown


@pytest.mark.parametrize("url", ["http://:secret@x", "localhost:6379", "redis://:secret@host:port/0"])
def test_a_url_that_is_none_is_a_users_fault(url: str) -> None:
    with pytest.raises(ConfigError, match="redis_url=") as raised:
        QueueConnection(url)
    assert "secret" not in raised.value.message


@pytest.mark.parametrize("password", ["sec[ret", "sec]ret", "[sec]ret", "sec/ret"])
def test_a_password_that_breaks_the_url_is_told_without_it(password: str) -> None:
    url = f"redis://user:{password}@host:6379/0"
    for use in (QueueConnection, without_identity, split_url):
        with pytest.raises(
            ConfigError, match=r"^redis_url=redis://user:\*\*\*@host:6379/0: cannot be read; .* %5B"
        ) as raised:
            use(url)
        assert "sec" not in raised.value.message and raised.value.__cause__ is None
    assert split_url(f"redis://user:{quote(password, safe='')}@host:6379/0").hostname == "host"


async def test_nobody_there_is_said_within_the_patience() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    connection = QueueConnection(f"redis://:secret@127.0.0.1:{port}/0")
    began = time.monotonic()
    with pytest.raises(QueueUnavailableError, match=rf"redis redis://:\*\*\*@127.0.0.1:{port}/0: not reachable"):
        await connection.open(patience_s=0.3)
    assert time.monotonic() - began < 2.0
    await connection.close()


async def test_open_waits_for_a_redis_that_comes_up(make_redis: Any) -> None:
    server = make_redis()
    server.stop()
    connection = QueueConnection(server.url)
    opening = asyncio.create_task(connection.open(patience_s=5.0))
    await asyncio.sleep(0.2)
    assert not opening.done()
    server.start()
    await opening
    await connection.close()


async def test_an_evicting_redis_is_refused(make_redis: Any) -> None:
    server = make_redis("maxmemory-policy allkeys-lru")
    connection = QueueConnection(server.url)
    with pytest.raises(QueueMisconfiguredError, match=r"maxmemory-policy=allkeys-lru.*CONFIG SET maxmemory-policy"):
        await connection.open()
    await connection.close()


async def test_a_wrong_password_is_not_tried_again(make_redis: Any) -> None:
    server = make_redis(over_tcp=True)
    connection = QueueConnection(server.url.replace("redis://:", "redis://:wrong"))
    began = time.monotonic()
    with pytest.raises(UnauthenticatedError, match=r"correct user and password in the URL$"):
        await connection.open(patience_s=5.0)
    assert time.monotonic() - began < 2.0
    await connection.close()


async def test_whoever_is_refused_is_told_what_to_give(make_redis: Any) -> None:
    server = make_redis(over_tcp=True)
    url = "redis://127.0.0.1:" + server.url.rpartition(":")[2]
    with_user = url.replace("//", "//code@")
    for place, credentials, way_out in (
        (url, Credentials(), "give a token, or user and password in the URL"),
        (url, Credentials(token="wrong", user="math"), "give the token or password of math, or let `opd tenants acl"),
        (with_user, Credentials(token="wrong", user="math"), "give the token or password of code, or let"),
        (url, Credentials(token="wrong"), "give the token or password of the URL's user, or let"),
    ):
        connection = QueueConnection(place, credentials=credentials)
        with pytest.raises(UnauthenticatedError, match=way_out) as caught:
            await connection.open()
        assert "\n" not in caught.value.message and "wrong" not in caught.value.message
        await connection.close()


async def test_a_forbidden_command_is_not_tried_again(redis_url: str) -> None:
    with Redis.from_url(redis_url) as redis:
        redis.execute_command("ACL", "SETUSER", "narrow", "on", "nopass", "~*", "+info", "+ping")
    connection = QueueConnection(redis_url + "&username=narrow&password=x")
    await connection.open()
    with pytest.raises(PermissionDeniedError, match="render the user's rules"):
        await connection.call(lambda client: client.get("x"))
    await connection.close()
    with Redis.from_url(redis_url) as redis:
        redis.acl_deluser("narrow")


async def test_a_lost_redis_is_waited_for_and_the_loss_is_noted(make_redis: Any) -> None:
    server = make_redis()
    connection = QueueConnection(server.url, patience_s=10.0)
    await connection.open()
    await connection.call(lambda redis: redis.set("x", "1"))
    server.stop()
    reading = asyncio.create_task(connection.call(lambda redis: redis.get("x")))
    await asyncio.sleep(0.2)
    server.start()
    assert await reading == b"1"
    assert connection.epoch >= 1
    await connection.close()


async def test_patience_ends(make_redis: Any) -> None:
    server = make_redis()
    connection = QueueConnection(server.url, patience_s=0.3)
    await connection.open()
    server.kill()
    with pytest.raises(QueueUnavailableError, match=r"not reachable for 0.3 s"):
        await connection.call(lambda redis: redis.get("x"))
    await connection.close()


async def test_scripts_survive_a_flush_of_the_script_cache(redis_url: str) -> None:
    connection = QueueConnection(redis_url)
    for _ in range(2):
        assert await connection.script("probe", "opd:{q}:active", "opd:{q}:", "math", "00ff", "r.0") == [b"absent"]
        await connection.call(lambda redis: redis.script_flush())
    await connection.close()


async def test_a_fault_in_redis_is_an_internal_error_and_not_repeated(redis_url: str) -> None:
    connection = QueueConnection(redis_url)
    with pytest.raises(InternalError, match="wrong number of arguments"):
        await connection.call(lambda redis: redis.execute_command("GET"))
    assert connection.epoch == 0
    await connection.close()


async def test_values_above_the_bound_are_never_fetched(redis_url: str) -> None:
    connection = QueueConnection(redis_url)
    with Redis.from_url(redis_url) as redis:
        redis.mset({"small": b"abc", "large": b"x" * 1000, "full": b"x" * 10})
        redis.config_resetstat()
        assert await connection.read_bounded(["small", "large", "none", "full"], 10) == [b"abc", 1000, None, b"x" * 10]
        assert redis.info("commandstats")["cmdstat_get"]["calls"] == 2
    assert await connection.read_bounded([], 10) == []
    await connection.close()
