"""What `opd doctor` finds of real Redis servers in states that they should not be in."""

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import quote

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from opd.credentials import Credentials
from opd.queue.access import hash_password, pool_rules, tenant_rules
from services.doctor.findings import Verdict
from tests.conftest import MakeRedis
from tests.integration.doctor.conftest import Look, altered, announced, findings_of, handshake

PASSWORD = "a long enough password"
HASH = hash_password("math", PASSWORD)


def version_of(url: str) -> tuple[int, int]:
    with Redis.from_url(url) as redis:
        major, minor = str(redis.info("server")["redis_version"]).split(".")[:2]
    return int(major), int(minor)


def test_a_sound_server_has_nothing_to_mend_but_its_age(make_redis: MakeRedis, look: Look) -> None:
    found = look(redis_url=make_redis("maxmemory 200mb").url)
    assert {check: finding.verdict for check, finding in found.items() if check != "redis version"} == {
        "redis": Verdict.OK,
        "redis default user": Verdict.OK,
        "redis memory policy": Verdict.OK,
        "redis memory": Verdict.OK,
        "redis persistence": Verdict.OK,
    }


def test_6_2_is_told_of_what_it_cannot_keep_apart(redis_url: str, look: Look) -> None:
    is_old = version_of(redis_url) < (7, 0)
    assert look(redis_url=redis_url)["redis version"].verdict is (Verdict.WARN if is_old else Verdict.OK)


def test_an_evicting_policy(make_redis: MakeRedis, look: Look) -> None:
    found = look(redis_url=make_redis("maxmemory-policy allkeys-lru").url)["redis memory policy"]
    assert found.verdict is Verdict.FAIL and "allkeys-lru" in found.message
    assert "CONFIG SET maxmemory-policy noeviction" in found.mend


def test_a_server_without_limit_and_without_log(make_redis: MakeRedis, look: Look) -> None:
    found = look(redis_url=make_redis("appendonly no").url)
    assert found["redis memory"].verdict is Verdict.WARN and "no maxmemory" in found["redis memory"].message
    assert found["redis persistence"].verdict is Verdict.WARN


def test_a_server_whose_memory_is_nearly_used_up(make_redis: MakeRedis, look: Look) -> None:
    server = make_redis("maxmemory 100mb")
    with Redis.from_url(server.url) as redis:
        # Large beside what the examination's own connection takes.
        # Grown in place: a value that travels would lie in the connection's own buffer for a while as well.
        redis.setrange("much", 20_000_000, b"end")
        used = int(redis.info("memory")["used_memory"])
        redis.config_set("maxmemory", int(used / 0.65))
        assert look(redis_url=server.url)["redis memory"].verdict is Verdict.WARN
        redis.config_set("maxmemory", int(used / 0.9))
    found = look(redis_url=server.url)["redis memory"]
    assert found.verdict is Verdict.FAIL and "nothing is admitted" in found.message


def test_a_server_that_cannot_write_its_snapshot(make_redis: MakeRedis, look: Look) -> None:
    server = make_redis("appendonly no")
    with Redis.from_url(server.url) as redis:
        # A folder in the snapshot's place, which root cannot write over either.
        (server.data_dir / "dump.rdb").mkdir()
        (server.data_dir / "dump.rdb" / "x").touch()
        with pytest.raises(ResponseError):
            redis.save()
        redis.bgsave()
        while redis.info("persistence")["rdb_bgsave_in_progress"]:
            pass
    found = look(redis_url=server.url)["redis persistence"]
    assert found.verdict is Verdict.FAIL and "last write to disk failed" in found.message


def test_a_wrong_password_and_none(make_redis: MakeRedis, look: Look) -> None:
    server = make_redis(over_tcp=True)
    place = server.url.rpartition("@")[2]
    for url in (f"redis://:wrong@{place}", f"redis://{place}"):
        (found,) = look(redis_url=url).values()
        assert (found.check, found.verdict) == ("redis user", Verdict.FAIL)
        assert "wrong" not in found.message.replace("WRONGPASS", "")
    assert look(redis_url=server.url)["redis password"].verdict is Verdict.WARN


def test_no_server_and_one_that_says_nothing(look: Look) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (1, silent.getsockname()[1]):
            (found,) = look(redis_url=f"redis://127.0.0.1:{port}/0").values()
            assert (found.check, found.verdict) == ("redis", Verdict.FAIL) and "not reachable" in found.message


async def test_an_old_version(make_redis: MakeRedis) -> None:
    """A real server, with its word about its version exchanged on the way."""
    server = make_redis(over_tcp=True)
    version = ".".join(map(str, version_of(server.url)))
    async with altered(server.url, f"redis_version:{version}", "redis_version:5.0") as url:
        found = (await findings_of(redis_url=url))["redis version"]
    assert found.verdict is Verdict.FAIL and found.message.startswith("5.0")


@pytest.mark.parametrize("field", ["redis_version", "maxmemory_policy", "used_memory", "maxmemory"])
async def test_a_field_that_info_lacks_is_named(make_redis: MakeRedis, field: str) -> None:
    """As some managed services leave fields out; here the field has another name of the same length on the way."""
    server = make_redis(over_tcp=True)
    async with altered(server.url, f"\r\n{field}:", f"\r\n{'x' * len(field)}:") as url:
        (found,) = (await findings_of(redis_url=url)).values()
    assert (found.check, found.verdict) == ("redis", Verdict.FAIL)
    assert f"its INFO has no {field}," in found.message and "KeyError" not in found.message


@pytest.fixture
def guarded(make_redis: MakeRedis) -> Iterator[tuple[str, "Redis"]]:
    """A server with a tenant's and a pool's user, and its own to change them with."""
    url = make_redis().url
    with Redis.from_url(url) as redis:
        rules = tenant_rules("math", ["qwen"], [HASH], version=version_of(url))
        redis.execute_command("ACL", "SETUSER", "math", *rules)
        redis.execute_command("ACL", "SETUSER", "pool", *pool_rules(["qwen"], [HASH]))
        asyncio.run(_announce_once(url))
        yield url, redis


async def _announce_once(url: str) -> None:
    consumer = await announced(url, "r0", handshake())
    await consumer._connection.close()


def test_the_rendered_users_may_do_all_they_need_and_leave_nothing(guarded: tuple[str, "Redis"], look: Look) -> None:
    url, redis = guarded
    before = sorted(redis.keys("*"))
    mine = Credentials(token=PASSWORD, user="math")
    found = look(redis_url=url, teachers=("qwen",), tenant="math", credentials=mine)
    assert found["redis rights in qwen"].verdict is Verdict.OK, found
    assert found["handshake of qwen"].verdict is Verdict.OK
    pools = Credentials(token=PASSWORD, user="pool")
    found = look(redis_url=url, teachers=("qwen",), redis_credentials=pools)
    assert found["redis rights in qwen"].verdict is Verdict.OK, found
    assert found["replicas of qwen"].verdict is Verdict.OK
    assert sorted(redis.keys("*")) == before


@pytest.mark.parametrize(
    ("rule", "refused"),
    [("-hget", "HGET"), ("-eval", "EVAL"), ("-lpush", "LPUSH"), ("-xadd", "XADD"), ("-pexpire", "PEXPIRE")],
)
def test_each_right_that_a_tenant_lacks_is_named(
    guarded: tuple[str, "Redis"], look: Look, rule: str, refused: str
) -> None:
    url, redis = guarded
    redis.execute_command("ACL", "SETUSER", "math", rule)
    mine = Credentials(token=PASSWORD, user="math")
    found = look(redis_url=url, teachers=("qwen",), tenant="math", credentials=mine)["redis rights in qwen"]
    assert found.verdict is Verdict.FAIL and f"{refused} opd:{{qwen}}:" in found.message
    assert "opd tenants acl --apply" in found.mend


def test_a_tenant_of_another_pool_is_refused_here(guarded: tuple[str, "Redis"], look: Look) -> None:
    url, redis = guarded
    redis.execute_command("ACL", "SETUSER", "math", *tenant_rules("math", ["best"], [HASH], version=version_of(url)))
    mine = Credentials(token=PASSWORD, user="math")
    found = look(redis_url=url, teachers=("best", "qwen"), tenant="math", credentials=mine)
    assert found["redis rights in best"].verdict is Verdict.OK
    # Its alias is the first thing asked for, and what refuses it.
    assert {finding.verdict for check, finding in found.items() if "qwen" in check} == {Verdict.FAIL}


def test_a_user_who_may_not_ask_for_the_servers_state(guarded: tuple[str, "Redis"], look: Look) -> None:
    url, redis = guarded
    redis.execute_command("ACL", "SETUSER", "math", "-info")
    found = look(redis_url=url, tenant="math", credentials=Credentials(token=PASSWORD, user="math"))
    assert found["redis"].verdict is Verdict.FAIL and "info" in found["redis"].message.lower()


def test_a_password_in_the_url_is_never_shown(make_redis: MakeRedis, look: Look) -> None:
    url = make_redis(over_tcp=True).url
    password = url.partition("://:")[2].partition("@")[0]
    found = look(redis_url=url.replace(password, quote(password)))
    assert all(password not in str(replace(finding)) for finding in found.values())
