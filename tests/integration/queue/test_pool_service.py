"""`opd pool serve` and the operator's functions, against a real Redis that also goes away."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from opd.errors import ConfigError, DeadLetterError, InvalidRequestError, TeacherUnavailableError
from opd.lifecycle import Shutdown
from opd.queue.score_client import QueueScoreClient
from opd.queue.score_consumer import LeaseRules, ScoreConsumer
from opd.settings import load_settings
from opd.types import ScoreRequest
from opd.wire.messages import encode_request
from services.teacher_server.pool import (
    PoolConfig,
    dead_letter,
    dead_letters,
    promote,
    requeue_dead_letter,
    serve_pool,
)
from services.teacher_server.queue_access import QueueAccess

REQUEST = ScoreRequest(
    rollout_id="r.0.0",
    tenant="math",
    teacher="qwen",
    prompt_token_ids=np.array([5, 9], np.int32),
    response_token_ids=np.array([7], np.int32),
)


class Service:
    """A running pool service and a client of it."""

    def __init__(self) -> None:
        self.shutdown = Shutdown()
        self.port: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{await self.port}", trust_env=False) as http:
            return await http.get(path)


async def run_service(url: str) -> AsyncIterator[Service]:
    service = Service()
    config = PoolConfig(teachers=("qwen", "best"), redis_url=url, port=0, cache_s=0.0, patience_s=0.3)
    task = asyncio.create_task(serve_pool(config, service.shutdown, service.port.set_result))
    yield service
    service.shutdown.request("test")
    await task


@pytest.fixture
async def service(redis_url: str) -> AsyncIterator[Service]:
    async for found in run_service(redis_url):
        yield found


async def bury_one(url: str) -> None:
    """One request that takes its replica down twice."""
    client = await QueueScoreClient.connect(url, pool="qwen", tenant="math")
    body = encode_request(REQUEST)
    asking = asyncio.create_task(client.score(rollout_id="r.0.0", num_tokens=3, timeout_ms=20_000, body=body))
    rules = LeaseRules(lease_ms=50, max_deliveries=1, poll_s=0.02)
    for name, num_deliveries in (("victim", 1), ("next", 0)):
        consumer = await ScoreConsumer.connect(url, pool="qwen", name=name, rules=rules)
        assert len(await consumer.take(token_budget=10, wait_s=0.3)) == num_deliveries
        await asyncio.sleep(0.1)
        consumer._held.clear()
        await consumer.close()
    with pytest.raises(DeadLetterError):
        await asking
    await client.close()


async def test_it_serves_while_the_pool_is_at_zero(service: Service) -> None:
    assert (await service.get("/healthz")).json() == {"status": "ok"}
    teachers = (await service.get("/v1/pool")).json()["teachers"]
    assert set(teachers) == {"qwen", "best"}
    assert (teachers["qwen"]["backlog_tokens"], teachers["qwen"]["replicas"]) == (0, [])
    assert 'opd_pool_replicas{teacher="qwen"} 0.0' in (await service.get("/metrics")).text


async def test_it_shows_what_an_autoscaler_wants_to_know(redis_url: str, service: Service) -> None:
    client = await QueueScoreClient.connect(redis_url, pool="qwen", tenant="math")
    consumer = await ScoreConsumer.connect(redis_url, pool="qwen", name="one")
    await consumer.announce(b"me")
    asking = asyncio.create_task(client.score(rollout_id="r.0.0", num_tokens=70, timeout_ms=9000, body=b"b"))
    (delivery,) = await consumer.take(token_budget=100, wait_s=5.0)
    state = (await service.get("/v1/pool")).json()["teachers"]["qwen"]
    assert (state["backlog_tokens"], state["leased_entries"]) == (70, 1)
    assert [replica["replica_id"] for replica in state["replicas"]] == ["one"]
    assert state["tenants"][0]["tenant"] == "math"
    text = (await service.get("/metrics")).text
    assert 'opd_pool_backlog_tokens{teacher="qwen",tenant="math"} 70.0' in text
    assert 'opd_pool_total_backlog_tokens{teacher="qwen"} 70.0' in text
    assert 'opd_pool_replicas{teacher="qwen"} 1.0' in text
    assert 'opd_pool_entries{teacher="qwen",what="delivered"} 1.0' in text
    await consumer.complete(delivery, b"scores")
    await asking
    await client.close()
    await consumer.close()


async def test_a_lost_redis_is_503_and_the_service_stays(make_redis: Any) -> None:
    server = make_redis()
    async for service in run_service(server.url):
        server.kill()
        for path in ("/healthz", "/v1/pool", "/metrics"):
            answer = await service.get(path)
            assert (answer.status_code, answer.json()["code"]) == (503, "queue_unavailable")
            assert "not reachable" in answer.json()["message"]
        server.start()
        assert (await service.get("/healthz")).status_code == 200


async def test_a_port_in_use_is_a_users_fault(redis_url: str, service: Service) -> None:
    config = PoolConfig(teachers=("qwen",), redis_url=redis_url, port=await service.port)
    with pytest.raises(ConfigError, match="cannot be listened on at"):
        await serve_pool(config, Shutdown())


async def test_dead_letters_can_be_listed_shown_and_put_back(redis_url: str) -> None:
    access = QueueAccess(redis_url=redis_url)
    await bury_one(redis_url)
    (letter,) = await asyncio.to_thread(dead_letters, access, "qwen")
    assert (letter.tenant, letter.rollout_id, letter.num_tokens, letter.num_deliveries) == ("math", "r.0.0", 3, 1)
    assert letter.last_replica == "victim"
    shown, request = await asyncio.to_thread(dead_letter, access, "qwen", "math", letter.dead_id)
    assert shown == letter
    assert request.prompt_token_ids.tolist() == [5, 9]
    await asyncio.to_thread(requeue_dead_letter, access, "qwen", "math", letter.dead_id)
    assert await asyncio.to_thread(dead_letters, access, "qwen") == []
    consumer = await ScoreConsumer.connect(redis_url, pool="qwen", name="mended")
    (delivery,) = await consumer.take(token_budget=10)
    assert (delivery.rollout_id, delivery.delivery_count) == ("r.0.0", 1)
    assert await consumer.complete(delivery, b"scores")
    await consumer.close()


@pytest.mark.parametrize("act", [dead_letter, requeue_dead_letter])
async def test_a_dead_letter_that_is_not_there_is_named(redis_url: str, act: Any) -> None:
    access = QueueAccess(redis_url=redis_url)
    with pytest.raises(InvalidRequestError, match="dead letter 1-0 of tenant math in pool qwen: not there"):
        await asyncio.to_thread(act, access, "qwen", "math", "1-0")


async def test_promoting_moves_the_name(redis_url: str) -> None:
    access = QueueAccess(redis_url=redis_url)
    consumer = await ScoreConsumer.connect(redis_url, pool="qwen@00ff", name="one")
    with pytest.raises(TeacherUnavailableError, match=r"teacher=qwen@00ff: no replica ever announced itself"):
        await asyncio.to_thread(promote, access, "qwen", "qwen@00ff", is_forced=True)
    await consumer.publish_info(b"handshake")
    with pytest.raises(TeacherUnavailableError, match=r"^pool=qwen@00ff: has no live replica.*--force"):
        await asyncio.to_thread(promote, access, "qwen", "qwen@00ff")
    assert await asyncio.to_thread(promote, access, "qwen", "qwen@00ff", is_forced=True) is None
    await consumer.announce(b"handshake")
    assert await asyncio.to_thread(promote, access, "qwen", "qwen@00ff") == "qwen@00ff"
    await consumer.close()
    with pytest.raises(InvalidRequestError, match=r"^name=qwen@00ff: is a pool, not a teacher's name"):
        await asyncio.to_thread(promote, access, "qwen@00ff", "qwen@00ff")
    with pytest.raises(InvalidRequestError, match=r"^pool=qwen@00ff: is of another teacher than best"):
        await asyncio.to_thread(promote, access, "best", "qwen@00ff")


def test_configuration_faults_are_named() -> None:
    with pytest.raises(ConfigError, match="teachers"):
        load_settings(PoolConfig, None, ['teachers=["a b"]'])
    with pytest.raises(ConfigError, match="teachers: is required"):
        load_settings(PoolConfig)


async def test_without_a_redis_url_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPD_REDIS_URL", raising=False)
    with pytest.raises(ConfigError, match="redis_url: is not given"):
        await serve_pool(PoolConfig(teachers=("qwen",)), Shutdown())
