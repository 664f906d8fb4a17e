"""What `opd doctor` finds of pools: nobody there, different teachers under one name, work that is not shared."""

import asyncio
from pathlib import Path

import pytest

from opd.queue.score_client import QueueScoreClient
from services.doctor.findings import Verdict
from services.doctor.teacher_checks import _addresses
from tests.integration.doctor.conftest import announced, findings_of, handshake
from tests.integration.queue.test_pool_service import bury_one


async def test_a_pool_that_nobody_ever_served(redis_url: str) -> None:
    found = await findings_of(redis_url=redis_url, teachers=("qwen",))
    assert found["handshake of qwen"].verdict is Verdict.FAIL
    assert "no replica ever announced itself" in found["handshake of qwen"].message
    assert found["replicas of qwen"].verdict is Verdict.WARN


async def test_requests_that_nobody_takes(redis_url: str) -> None:
    client = await QueueScoreClient.connect(redis_url, pool="qwen", tenant="math")
    asking = asyncio.create_task(client.score(rollout_id="r.0.0", num_tokens=3, timeout_ms=9000, body=b"b"))
    await asyncio.sleep(0.3)
    found = (await findings_of(redis_url=redis_url, teachers=("qwen",)))["replicas of qwen"]
    assert found.verdict is Verdict.FAIL and found.message == "none lives and 1 requests wait"
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await client.close()


async def test_replicas_of_different_weights_and_of_different_versions(redis_url: str) -> None:
    one = await announced(redis_url, "r0", handshake())
    two = await announced(redis_url, "r1", handshake(version="0.2.0"))
    found = await findings_of(redis_url=redis_url, teachers=("qwen",))
    assert found["likeness of qwen"].verdict is Verdict.WARN and "0.2.0 (r1)" in found["likeness of qwen"].message
    await two.announce(handshake("def456"), expiry_s=30.0)
    found = await findings_of(redis_url=redis_url, teachers=("qwen",))
    assert found["likeness of qwen"].verdict is Verdict.FAIL
    assert "abc123 (r0); def456 (r1)" in found["likeness of qwen"].message
    await two.announce(handshake(), expiry_s=30.0)
    found = await findings_of(redis_url=redis_url, teachers=("qwen",))
    assert found["likeness of qwen"].verdict is found["balance of qwen"].verdict is Verdict.OK
    await one.close()
    await two.close()


async def test_a_replica_that_holds_nothing_while_requests_wait(redis_url: str) -> None:
    busy = await announced(redis_url, "busy", handshake())
    idle = await announced(redis_url, "idle", handshake())
    client = await QueueScoreClient.connect(redis_url, pool="qwen", tenant="math")
    asking = [
        asyncio.create_task(client.score(rollout_id=f"r.0.{number}", num_tokens=10, timeout_ms=20_000, body=b"b"))
        for number in range(6)
    ]
    await asyncio.sleep(0.3)
    assert len(await busy.take(token_budget=30)) == 3
    found = (await findings_of(redis_url=redis_url, teachers=("qwen",)))["balance of qwen"]
    assert found.verdict is Verdict.WARN
    assert found.message == "idle holds nothing, busy holds 3, and 3 requests wait"
    assert len(await idle.take(token_budget=30)) == 3
    found = (await findings_of(redis_url=redis_url, teachers=("qwen",)))["balance of qwen"]
    assert found.verdict is Verdict.OK and found.message == "busy holds 3, idle holds 3"
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    for part in (client, busy, idle):
        await part.close()


async def test_dead_letters(redis_url: str) -> None:
    await bury_one(redis_url)
    found = (await findings_of(redis_url=redis_url, teachers=("qwen",)))["dead letters of qwen"]
    assert found.verdict is Verdict.WARN and "opd pool dead list --teacher qwen" in found.mend


async def test_a_teacher_that_does_not_answer_over_grpc() -> None:
    found = await findings_of(grpc_urls=("grpc://127.0.0.1:1", "http://127.0.0.1:1", "grpc://no.such.name.invalid:1"))
    assert {check: finding.verdict for check, finding in found.items()} == {
        "redis": Verdict.SKIPPED,
        "grpc grpc://127.0.0.1:1": Verdict.FAIL,
        "grpc http://127.0.0.1:1": Verdict.FAIL,
        "grpc grpc://no.such.name.invalid:1": Verdict.FAIL,
    }


async def test_every_address_of_a_name_is_asked_by_itself() -> None:
    assert await _addresses("127.0.0.1:50051") == ["127.0.0.1:50051"]
    assert await _addresses("[::1]:50051") == ["[::1]:50051"]
    assert await _addresses("unix:///tmp/teacher.sock") == ["unix:///tmp/teacher.sock"]
    assert "127.0.0.1:50051" in await _addresses("localhost:50051")


@pytest.mark.parametrize("lost", [True, False])
async def test_an_unreadable_handshake_is_a_finding(redis_url: str, tmp_path: Path, lost: bool) -> None:
    consumer = await announced(redis_url, "r0", b"\xff\xff no handshake")
    found = await findings_of(redis_url=redis_url, teachers=("qwen",), folders=(tmp_path,) if lost else ())
    assert found["handshake of qwen"].verdict is Verdict.FAIL
    await consumer.close()
