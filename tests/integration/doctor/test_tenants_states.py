"""What `opd doctor` finds where tenants are kept apart: their users in Redis, and one request of its own."""

from pathlib import Path

import pytest
from redis import Redis

from opd.credentials import Credentials
from opd.queue.access import tenant_rules
from opd.queue.connection import QueueConnection
from opd.queue.embedded import EmbeddedRedis
from opd.queue.keys import PoolKeys
from opd.queue.pools import promote_pool
from services.doctor.findings import Finding, Verdict
from services.teacher_server.tenants import hash_token
from services.teacher_server.tenants_file import add_tenant
from tests.integration.doctor.conftest import announced, findings_of, handshake
from tests.integration.doctor.test_redis_states import version_of
from tests.integration.teacher_server.conftest import StartTeacher, start_teacher, teacher_folder

__all__ = ["start_teacher", "teacher_folder"]
TOKEN = f"token of math {'x' * 30}"
USERS, POOL = "redis users of tenants", "qwen@abc123"


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.toml"
    add_tenant(path, "math", TOKEN, weight=1.0, max_inflight_tokens=None, hidden_states=False)
    return path


def set_user(url: str, *pools: str) -> None:
    rules = tenant_rules("math", pools, [hash_token(TOKEN)], version=version_of(url))
    with Redis.from_url(url) as redis:
        redis.execute_command("ACL", "SETUSER", "math", *rules)


async def promote(url: str) -> None:
    """A live replica of one fingerprint under the teacher's name."""
    connection = QueueConnection(url)
    await (await announced(url, "r0", handshake(), pool=POOL))._connection.close()
    await promote_pool(connection, "qwen", POOL, is_forced=True)
    await connection.close()


async def users_of(url: str, tenants: Path) -> Finding:
    return (await findings_of(redis_url=url, teachers=("qwen",), tenants_file=tenants))[USERS]


async def test_rights_are_those_in_the_promoted_pool(redis_url: str, tenants: Path) -> None:
    set_user(redis_url, "qwen")
    found = await users_of(redis_url, tenants)
    assert found.verdict is Verdict.OK and found.message.endswith("qwen")
    await promote(redis_url)
    found = await users_of(redis_url, tenants)
    assert found.verdict is Verdict.FAIL and f"for {POOL}: math" in found.message
    assert f"--teacher {POOL}" in found.mend
    set_user(redis_url, POOL)
    found = await users_of(redis_url, tenants)
    assert found.verdict is Verdict.OK and found.message.endswith(POOL)


async def test_a_user_who_may_not_list_users_is_told_so(redis_url: str, tenants: Path) -> None:
    set_user(redis_url, "qwen")
    mine = Credentials(token=TOKEN, user="math")
    asked = {"redis_url": redis_url, "teachers": ("qwen",), "tenants_file": tenants}
    found = await findings_of(**asked, redis_credentials=mine)
    assert found[USERS].verdict is Verdict.SKIPPED and "may not ask" in found[USERS].message


async def test_no_request_is_sent_that_the_tenants_file_refuses(redis_url: str, tenants: Path) -> None:
    found = await findings_of(redis_url=redis_url, teachers=("qwen",), tenants_file=tenants, scores=True)
    assert found["score by qwen over unix"].verdict is Verdict.SKIPPED
    assert "--tenant NAME" in found["score by qwen over unix"].message
    with Redis.from_url(redis_url) as redis:
        assert redis.exists(PoolKeys("qwen").requests("doctor")) == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_guarded_teacher_is_scored_by_a_tenant_alone(
    start_teacher: StartTeacher, tmp_path: Path, tenants: Path
) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        teacher = start_teacher(f"redis_url={server.url}", f"tenants_file={tenants}")
        url = f"grpc://127.0.0.1:{teacher.wait_ready()['grpc_port']}"
        both = ("score by tiny over unix", "score by tiny over grpc")
        asked = {"redis_url": server.url, "teachers": ("tiny",), "grpc_urls": (url,), "scores": True, "patience_s": 3.0}
        # The token opens the way to the teacher; whose it is has not been said.
        found = await findings_of(**asked, credentials=Credentials(token=TOKEN))
        for check in both:
            assert found[check].verdict is Verdict.SKIPPED, found[check]
            assert "--tenant NAME" in found[check].message and "--token-file" in found[check].message
        set_user(server.url, "tiny")
        mine = Credentials(token=TOKEN, user="math")
        found = await findings_of(**asked, credentials=mine, tenant="math")
        assert {found[check].verdict for check in both} == {Verdict.OK}, found
        # In another tenant's name it is no lack of an option, but a refusal.
        found = await findings_of(**asked, credentials=mine, tenant="code")
        assert {found[check].verdict for check in both} == {Verdict.FAIL}, found
        assert teacher.end() == 0
