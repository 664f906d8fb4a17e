"""`opd.client` as a trainer of somebody else would use it: both transports, async and from a thread."""

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from opd.client import ScoreClient, SyncScoreClient
from opd.errors import (
    ConfigError,
    InvalidRequestError,
    NonFiniteError,
    OpdError,
    OverCapacityError,
    QueueUnavailableError,
    TeacherUnavailableError,
)
from opd.queue.connection import QueueConnection
from opd.queue.pools import promote_pool, publish_info
from opd.queue.score_consumer import LeaseRules, ScoreConsumer
from opd.rpc.status import trailing_metadata
from opd.types import ScoreReply, ScoreRequest, Scores, TeacherInfo
from opd.wire.messages import (
    decode_request,
    encode_info,
    encode_reply,
    info_to_proto,
    reply_to_proto,
    request_from_proto,
)
from opd.wire.pb import teacher_pb2 as pb
from opd.wire.pb.teacher_pb2_grpc import TeacherServiceServicer, add_TeacherServiceServicer_to_server

INFO = TeacherInfo(
    teacher="qwen",
    fingerprint="00ff",
    model="tiny",
    engine="fake",
    vocab_rows=8,
    num_defined_ids=8,
    id_map_hash="abc",
)


def make_request(number: int, **changes: Any) -> ScoreRequest:
    request = ScoreRequest(
        rollout_id=f"run.0.{number}",
        tenant="math",
        teacher="qwen",
        prompt_token_ids=np.array([5, 9, 2], np.int32),
        response_token_ids=np.array([7, number % 8], np.int32),
    )
    return replace(request, **changes)


def answer(request: ScoreRequest) -> ScoreReply:
    """Log-probs that tell which request they belong to."""
    logprobs = -0.5 - request.response_token_ids.astype(np.float32)
    scores = Scores(sampled_logprobs=logprobs)
    return ScoreReply(rollout_id=request.rollout_id, teacher_fingerprint="00ff", scores=scores, replica="one")


def check(number: int, reply: ScoreReply) -> None:
    assert reply.rollout_id == f"run.0.{number}"
    assert reply.scores.sampled_logprobs is not None
    np.testing.assert_array_equal(reply.scores.sampled_logprobs, np.array([-7.5, -0.5 - number % 8], np.float32))


async def serve_queue(url: str, stop: asyncio.Event, *, pool: str = "qwen") -> None:
    consumer = await ScoreConsumer.connect(url, pool=pool, name=f"one-of-{pool}", rules=LeaseRules(poll_s=0.02))
    await consumer.publish_info(encode_info(replace(INFO, fingerprint=pool.partition("@")[2] or "00ff")))
    while not stop.is_set():
        for delivery in await consumer.take(token_budget=100, wait_s=0.05):
            request = decode_request(delivery.body)
            if request.score_top_k == 99:
                await consumer.fail(delivery, NonFiniteError("scores: NaN"))
            else:
                await consumer.complete(delivery, encode_reply(answer(request), request))
    await consumer.close()


@pytest.fixture
def queue_teacher(redis_url: str) -> Iterator[str]:
    """A replica in a thread of its own; yields the queue's URL."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve_queue(redis_url, stop),))
    thread.start()
    yield redis_url
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


class Servicer(TeacherServiceServicer):  # type: ignore[misc]
    """Refuses with `refusals` first."""

    def __init__(self) -> None:
        self.refusals: list[OpdError] = []

    async def GetInfo(self, request: Any, context: Any) -> Any:
        return pb.GetInfoResponse() if self.refusals else info_to_proto(INFO)

    async def Score(self, request: Any, context: Any) -> Any:
        if self.refusals:
            error = self.refusals.pop(0)
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message, trailing_metadata(error))
        return pb.ScoreResponse(reply=reply_to_proto(answer(request_from_proto(request))))


@pytest.fixture
async def grpc_teacher() -> AsyncIterator[tuple[str, Servicer]]:
    server, servicer = grpc.aio.server(), Servicer()
    add_TeacherServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"grpc://127.0.0.1:{port}", servicer
    await server.stop(None)


async def test_scores_come_over_the_queue(queue_teacher: str) -> None:
    async with ScoreClient.connect(queue_teacher, teacher="qwen", tenant="math") as client:
        while True:
            try:
                assert (await client.info()).fingerprint == "00ff"
                break
            except TeacherUnavailableError:
                await asyncio.sleep(0.02)
        replies = await asyncio.gather(*(client.score(make_request(number)) for number in range(20)))
        for number, reply in enumerate(replies):
            check(number, reply)
        assert (client.stats.sent, client.stats.scored) == (20, 20)
        with pytest.raises(NonFiniteError, match="scores: NaN"):
            await client.score(make_request(0, score_top_k=99))


async def test_scores_come_over_grpc(grpc_teacher: tuple[str, Servicer]) -> None:
    url, servicer = grpc_teacher
    async with ScoreClient.connect(url, teacher="qwen", tenant="math") as client:
        assert (await client.info()).fingerprint == "00ff"
        check(3, await client.score(make_request(3)))
        servicer.refusals = [OverCapacityError("full", retry_after_s=0.05), TeacherUnavailableError("going")]
        check(4, await client.score(make_request(4)))
        assert (client.stats.sent, client.stats.scored, client.stats.resubmitted) == (2, 2, 2)
        servicer.refusals = [NonFiniteError("scores: NaN")]
        with pytest.raises(NonFiniteError, match="scores: NaN"):
            await client.score(make_request(5))
        assert client.stats.failed == 1


async def test_a_moved_alias_is_followed_between_steps(redis_url: str) -> None:
    connection, stop = QueueConnection(redis_url), asyncio.Event()
    for fingerprint in ("00aa", "00bb"):
        await publish_info(connection, f"qwen@{fingerprint}", encode_info(replace(INFO, fingerprint=fingerprint)))
    await promote_pool(connection, "qwen", "qwen@00aa", is_forced=True)
    async with ScoreClient.connect(redis_url, teacher="qwen", tenant="math") as client:
        assert (await client.info()).fingerprint == "00aa"
        asking = asyncio.create_task(client.score(make_request(1)))
        await asyncio.sleep(0.05)
        await promote_pool(connection, "qwen", "qwen@00bb", is_forced=True)
        # While a request is open the step keeps its teacher.
        assert (await client.info()).fingerprint == "00aa"
        old = asyncio.create_task(serve_queue(redis_url, stop, pool="qwen@00aa"))
        check(1, await asking)
        assert (await client.info()).fingerprint == "00bb"
        new = asyncio.create_task(serve_queue(redis_url, stop, pool="qwen@00bb"))
        check(2, await client.score(make_request(2)))
        assert client.stats.scored == 2
        stop.set()
        await asyncio.gather(old, new)
    await connection.close()


async def test_a_request_for_somebody_else_is_refused(redis_url: str) -> None:
    async with ScoreClient.connect(redis_url, teacher="qwen", tenant="math") as client:
        with pytest.raises(InvalidRequestError, match="use one client for each pair"):
            await client.score(make_request(0, tenant="code"))


async def test_a_client_must_be_open(redis_url: str) -> None:
    client = ScoreClient.connect(redis_url, teacher="qwen", tenant="math")
    with pytest.raises(QueueUnavailableError, match="is not open"):
        await client.score(make_request(0))
    await client.close()


@pytest.mark.parametrize("url", ["http://:secret@x", "x:1", ""])
def test_an_unknown_scheme_is_a_users_fault(url: str) -> None:
    with pytest.raises(ConfigError, match="must start with redis://") as raised:
        SyncScoreClient.connect(url, teacher="qwen", tenant="math")
    assert "secret" not in raised.value.message


def test_from_a_thread_with_ordinary_futures(queue_teacher: str) -> None:
    with SyncScoreClient.connect(queue_teacher, teacher="qwen", tenant="math") as client:
        futures = {client.submit(make_request(number)): number for number in range(20)}
        for future in concurrent.futures.as_completed(futures, timeout=20):
            check(futures[future], future.result())
        assert client.info().engine == "fake"
        assert client.stats.scored == 20
        with pytest.raises(NonFiniteError):
            client.submit(make_request(0, score_top_k=99)).result(timeout=20)


def test_closing_ends_every_future_and_the_thread(redis_url: str) -> None:
    client = SyncScoreClient.connect(redis_url, teacher="qwen", tenant="math")
    futures = [client.submit(make_request(number)) for number in range(3)]
    client.close()
    for future in futures:
        with pytest.raises(QueueUnavailableError, match="was closed"):
            future.result(timeout=5)
    with pytest.raises(QueueUnavailableError, match="is closed"):
        client.submit(make_request(9))
    client.close()
    assert not any(thread.name == "opd-score-client" for thread in threading.enumerate())


def test_a_cancelled_future_takes_its_request_back(redis_url: str) -> None:
    with SyncScoreClient.connect(redis_url, teacher="qwen", tenant="math") as client:
        future = client.submit(make_request(0))
        assert not concurrent.futures.wait([future], timeout=0.2).done
        assert future.cancel()
        again = client.submit(make_request(1))
        assert not concurrent.futures.wait([again], timeout=0.1).done


def test_a_teacher_nobody_reaches_leaves_no_thread() -> None:
    with pytest.raises(QueueUnavailableError, match="not reachable"):
        SyncScoreClient.connect("redis://127.0.0.1:1/0", teacher="qwen", tenant="math")
    assert not any(thread.name == "opd-score-client" for thread in threading.enumerate())


def test_a_pool_nobody_ever_served_is_named(redis_url: str) -> None:
    with (
        SyncScoreClient.connect(redis_url, teacher="nobody", tenant="math") as client,
        pytest.raises(TeacherUnavailableError, match="teacher=nobody: no replica ever announced itself"),
    ):
        client.info()
