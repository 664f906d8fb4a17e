"""10,000 broken messages against a real teacher, by every way in: each ends in a typed answer, and a good client beside
them loses nothing.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from redis.asyncio import Redis

from opd.client import ScoreClient
from opd.credentials import Credentials
from opd.errors import InternalError, OpdError, TeacherUnavailableError
from opd.queue.embedded import EmbeddedRedis
from opd.queue.keys import PoolKeys
from opd.queue.score_client import QueueScoreClient
from opd.wire.messages import decode_reply, decode_request
from services.teacher_server.tenants import new_token
from services.teacher_server.tenants_file import add_tenant
from tests.integration.teacher_server.conftest import TeacherProcess
from tests.integration.teacher_server.mutations import mutate, mutate_json, valid_bodies
from tests.unit.teacher_server.tiny_teachers import make_request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NUM_GRPC, NUM_HTTP, NUM_QUEUE, NUM_ENTRIES = 6500, 1000, 2000, 500
CONCURRENCY = 24
MALLORY, MATH = new_token(), new_token()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def teacher(
    tmp_path_factory: pytest.TempPathFactory, redis: EmbeddedRedis, teacher_folder: Path
) -> Iterator[TeacherProcess]:
    """One process for all: what the first thousands leave behind must not harm the next."""
    folder = tmp_path_factory.mktemp("mutated")
    tenants = folder / "tenants.toml"
    for name, token in (("mallory", MALLORY), ("math", MATH)):
        add_tenant(tenants, name, token, weight=1.0, max_inflight_tokens=None, hidden_states=False)
    settings = [f"model={teacher_folder}", "teacher=tiny", "torch_threads=1", f"redis_url={redis.url}"]
    found = TeacherProcess(folder / "teacher", *settings, f"tenants_file={tenants}", "queue.lease_s=20")
    try:
        found.wait_ready()
        yield found
        assert found.end() == 0
    finally:
        if found.process.poll() is None:
            found.process.kill()
        found.process.wait(10)


@asynccontextmanager
async def good_client(url: str, token: str | None) -> AsyncIterator[Callable[[], int]]:
    """Asks one question after another and checks every answer; tells how many there were."""
    answered, stop = [0], asyncio.Event()
    credentials = Credentials(token=token)

    async def ask() -> None:
        async with ScoreClient.connect(url, teacher="tiny", tenant="math", credentials=credentials) as client:
            while not stop.is_set():
                seed = answered[0]
                reply = await client.score(make_request(seed % 7, rollout_id=f"good.{seed}.0", timeout_ms=60_000))
                assert reply.scores.sampled_logprobs is not None
                assert np.isfinite(reply.scores.sampled_logprobs).all()
                answered[0] += 1

    task = asyncio.create_task(ask())
    yield lambda: answered[0]
    stop.set()
    await asyncio.wait_for(task, 60)


async def send_all(messages: list[Any], send: Callable[[Any], Awaitable[str]]) -> dict[str, int]:
    """Sends with bounded concurrency and counts how it ended."""
    turn, counts = asyncio.Semaphore(CONCURRENCY), dict[str, int]()

    async def one(message: Any) -> None:
        async with turn:
            outcome = await asyncio.wait_for(send(message), 60)
        counts[outcome] = counts.get(outcome, 0) + 1

    await asyncio.gather(*(one(message) for message in messages))
    return counts


def check(counts: dict[str, int], num_sent: int, teacher: TeacherProcess) -> None:
    assert sum(counts.values()) == num_sent
    assert counts.get("internal", 0) == 0 and counts["invalid_request"] > num_sent / 4, counts
    assert teacher.process.poll() is None, teacher.log
    assert "Traceback" not in teacher.log, teacher.log[-5000:]


async def test_over_grpc(teacher: TeacherProcess) -> None:
    generator, bodies = random.Random(1), valid_bodies("mallory")
    messages = [mutate(generator, bodies) for _ in range(NUM_GRPC)]
    address = f"127.0.0.1:{teacher.wait_ready()['grpc_port']}"
    async with grpc.aio.insecure_channel(address) as channel, good_client(f"grpc://{address}", MATH) as answered:
        calls = [channel.unary_unary(f"/opd.v1.TeacherService/{name}") for name in ("Score", "GetInfo")]

        async def send(item: tuple[int, bytes]) -> str:
            number, message = item
            try:
                # Every tenth goes to GetInfo.
                await calls[number % 10 == 0](message, timeout=50, metadata=(("authorization", f"Bearer {MALLORY}"),))
            except grpc.aio.AioRpcError as error:
                metadata = dict(error.trailing_metadata() or ())
                assert "opd-code" in metadata, error
                assert "\n" not in (error.details() or "")
                return str(metadata["opd-code"])
            return "ok"

        counts = await send_all(list(enumerate(messages)), send)
        assert answered() > 0
    check(counts, NUM_GRPC, teacher)


async def test_over_http(teacher: TeacherProcess) -> None:
    generator = random.Random(2)
    messages = [mutate_json(generator, "mallory") for _ in range(NUM_HTTP)]
    ports = teacher.wait_ready()
    url, headers = f"http://127.0.0.1:{ports['http_port']}", {"authorization": f"Bearer {MALLORY}"}
    async with (
        httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=60) as client,
        good_client(f"grpc://127.0.0.1:{ports['grpc_port']}", MATH) as answered,
    ):

        async def send(message: bytes) -> str:
            answer = await client.post("/v1/score", content=message)
            if answer.status_code == 200:
                return "ok"
            assert answer.status_code < 500 or answer.status_code in (501, 503, 504), answer.text
            return str(answer.json()["error"]["code"])

        counts = await send_all(messages, send)
        assert answered() > 0
    check(counts, NUM_HTTP, teacher)


async def test_over_the_queue(teacher: TeacherProcess, redis: EmbeddedRedis) -> None:
    generator, bodies = random.Random(3), valid_bodies("mallory")
    messages = [mutate(generator, bodies) for _ in range(NUM_QUEUE)]
    async with good_client(redis.url, None) as answered:
        client = await QueueScoreClient.connect(redis.url, pool="tiny", tenant="mallory")

        async def send(item: tuple[int, bytes]) -> str:
            number, message = item
            try:
                # The declared size is a lie now and then.
                num_tokens = 12 if number % 5 else 1 + number
                reply = await client.score(
                    rollout_id=f"bad.{number}", num_tokens=num_tokens, timeout_ms=50_000, body=message
                )
                decode_reply(reply, decode_request(message))
            except OpdError as error:
                assert not isinstance(error, InternalError | TeacherUnavailableError), error
                return error.code
            return "ok"

        counts = await send_all(list(enumerate(messages)), send)
        await client.close()
        assert answered() > 0
    check(counts, NUM_QUEUE, teacher)


async def test_entries_that_are_none(teacher: TeacherProcess, redis: EmbeddedRedis) -> None:
    """What a tenant writes into its own stream past the scripts."""
    generator, keys = random.Random(4), PoolKeys("tiny")
    odd = ["", "0", "-1", "1e400", "nan", "x" * 500, "\x00", "999999999999999999999", "a b", "12", "00ff"]
    async with good_client(redis.url, None) as answered, Redis.from_url(redis.url) as raw:
        for number in range(NUM_ENTRIES):
            fields = {name: generator.choice(odd) for name in generator.sample("rtidakz", generator.randint(1, 7))}
            await raw.xadd(keys.requests("mallory"), fields)
            if number % 50 == 0:
                await raw.sadd(keys.active, "mallory")
                await raw.lpush(keys.wake, "1")
        before = answered()
        async with asyncio.timeout(60):
            while answered() < before + 50:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        async with ScoreClient.connect(redis.url, teacher="tiny", tenant="mallory") as client:
            assert (await client.score(make_request(1, tenant="mallory"))).scores.sampled_logprobs is not None
    assert teacher.process.poll() is None and "Traceback" not in teacher.log, teacher.log[-5000:]
