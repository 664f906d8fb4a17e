"""What `opd doctor` finds of who is let into a real Redis without a password."""

from pathlib import Path

import pytest
from redis import Redis

from opd.credentials import Credentials
from opd.queue.access import hash_password, pool_rules
from opd.queue.connection import without_identity
from opd.queue.embedded import EmbeddedRedis
from services.doctor.findings import Verdict
from services.teacher_server.tenants_file import add_tenant
from tests.conftest import MakeRedis
from tests.integration.doctor.conftest import Look

PASSWORD = "a long enough password"
CHECK = "redis default user"


@pytest.fixture
def server(make_redis: MakeRedis) -> EmbeddedRedis:
    """Over TCP, where the default user has a password and the pool has a user of its own."""
    found = make_redis(over_tcp=True)
    with Redis.from_url(found.url) as redis:
        redis.execute_command("ACL", "SETUSER", "pool", *pool_rules(["qwen"], [hash_password("pool", PASSWORD)]))
    return found


def open_up(server: EmbeddedRedis) -> str:
    """Takes the default user's password away; the URL without one."""
    with Redis.from_url(server.url) as redis:
        redis.config_set("requirepass", "")
    return without_identity(server.url)


def as_pool(url: str) -> dict[str, object]:
    return {"redis_url": url, "redis_credentials": Credentials(token=PASSWORD, user="pool")}


def test_a_default_user_with_a_password_is_sound(server: EmbeddedRedis, look: Look) -> None:
    assert look(redis_url=server.url)[CHECK].verdict is Verdict.OK
    assert look(**as_pool(without_identity(server.url)))[CHECK].verdict is Verdict.OK


def test_an_open_default_user_is_seen_by_who_has_a_password(server: EmbeddedRedis, look: Look) -> None:
    found = look(**as_pool(open_up(server)))[CHECK]
    assert found.verdict is Verdict.WARN and "opd tenants acl --apply --close-default" in found.mend


def test_where_tenants_are_configured_it_fails(server: EmbeddedRedis, look: Look, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    add_tenant(tenants, "math", PASSWORD, weight=1.0, max_inflight_tokens=None, hidden_states=False)
    url = open_up(server)
    for found in (look(**as_pool(url), tenants_file=tenants), look(redis_url=url, tenant="math")):
        assert found[CHECK].verdict is Verdict.FAIL and "--close-default" in found[CHECK].mend


def test_the_command_that_it_names_mends_it(server: EmbeddedRedis, look: Look, tmp_path: Path) -> None:
    from services.teacher_server.queue_access import QueueAccess
    from services.teacher_server.tenant_access import AccessPlan, apply_plan

    tenants = tmp_path / "tenants.toml"
    add_tenant(tenants, "math", PASSWORD, weight=1.0, max_inflight_tokens=None, hidden_states=False)
    url = open_up(server)
    with Redis.from_url(url) as redis:
        redis.execute_command("ACL", "SETUSER", "admin", "on", f">{PASSWORD}", "~*", "+@all")
    admin = url.replace("redis://", f"redis://admin:{PASSWORD.replace(' ', '%20')}@")
    apply_plan(AccessPlan.load(tenants, ["qwen"], close_default=True), QueueAccess(redis_url=admin))
    assert look(redis_url=admin, tenants_file=tenants)[CHECK].verdict is Verdict.OK


def test_a_socket_for_its_owner_alone_needs_no_password(make_redis: MakeRedis, look: Look) -> None:
    server = make_redis()
    assert look(redis_url=server.url)[CHECK].verdict is Verdict.OK
    assert look(redis_url=server.url, tenant="math")[CHECK].verdict is Verdict.FAIL
    (server.data_dir / "redis.sock").chmod(0o777)
    assert look(redis_url=server.url)[CHECK].verdict is Verdict.WARN


def test_a_server_that_takes_no_second_connection_leaves_it_open(server: EmbeddedRedis, look: Look) -> None:
    with Redis.from_url(server.url) as redis:
        # One for us, one for the examination itself.
        redis.config_set("maxclients", 2)
        found = look(redis_url=server.url)
    assert found["redis"].verdict is Verdict.OK
    assert found[CHECK].verdict is Verdict.SKIPPED and "not reachable" in found[CHECK].message


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://user:a@b:p@host:6379/0", "redis://host:6379/0"),
        ("rediss://host/0?ssl_cert_reqs=none&password=x&username=y", "rediss://host/0?ssl_cert_reqs=none"),
        ("unix://user:secret@/run/redis.sock?db=3&password=x", "unix:///run/redis.sock?db=3"),
        ("redis://[::1]:6379", "redis://[::1]:6379"),
    ],
)
def test_a_place_without_who_is_there(url: str, place: str) -> None:
    assert without_identity(url) == place
