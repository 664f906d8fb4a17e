"""The queue shell over a real Redis, with an engine that does what it is told."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from opd.client import ScoreClient
from opd.errors import InvalidRequestError, NonFiniteError, OpdError, UnknownTeacherError
from opd.metrics import TeacherMetrics
from opd.queue.connection import QueueConnection
from opd.queue.keys import PoolKeys
from opd.queue.score_client import QueueScoreClient
from opd.queue.score_consumer import LeaseRules, ScoreConsumer
from opd.types import ScoreReply, ScoreRequest
from opd.wire.messages import encode_request
from services.teacher_server.batcher import BatchLimits, FairBatcher
from services.teacher_server.canary import Canary
from services.teacher_server.config import BatchingSettings, GrpcSettings, QueueSettings, TeacherConfig
from services.teacher_server.guarded_engine import GuardedEngine
from services.teacher_server.queue_intake import QueueIntake
from services.teacher_server.readiness import Part, Readiness
from services.teacher_server.scoring import TeacherScoring
from services.teacher_server.tenants import Tenant, TenantTable
from tests.conftest import MakeRedis
from tests.unit.teacher_server.fake_engine import NAN_ID, FakeEngine, fake_info, until
from tests.unit.teacher_server.tiny_teachers import make_request


class Replica:
    def __init__(self, url: str, name: str, executor: ThreadPoolExecutor, **changes: Any) -> None:
        queue = {"lease_s": 0.5, "announce_s": 0.2, "patience_s": 10.0} | changes.pop("queue", {})
        config = TeacherConfig(
            model="fake",
            queue=QueueSettings(**queue),
            batching=BatchingSettings(max_batch_tokens=changes.pop("max_batch_tokens", 64)),
            **changes,
        )
        info = fake_info(max_message_bytes=config.grpc.max_message_bytes, max_context=100_000)
        self.engine, self.readiness, self.metrics = FakeEngine(info), Readiness(), TeacherMetrics()
        canary = Canary(self.engine)
        assert canary.check().is_sound
        limits = BatchLimits(max_batch_tokens=config.batching.max_batch_tokens)
        self.scoring = TeacherScoring(
            GuardedEngine(self.engine, canary),
            FairBatcher(limits),
            executor,
            readiness=self.readiness,
            metrics=self.metrics,
            replica=name,
            linger_s=0.0,
        )
        self.intake = QueueIntake(
            config,
            QueueConnection(url, patience_s=config.queue.patience_s),
            self.scoring,
            readiness=self.readiness,
            metrics=self.metrics,
            replica=name,
        )
        self.readiness.clear(Part.START)
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.intake.start()
        self.tasks = [asyncio.create_task(self.scoring.run()), asyncio.create_task(self.intake.run())]

    async def stop_taking(self) -> None:
        self.tasks[1].cancel()
        await asyncio.gather(self.tasks[1], return_exceptions=True)

    async def end(self) -> None:
        self.engine.gate.set()
        await self.stop_taking()
        await self.intake.stop(1.0)
        self.tasks[0].cancel()
        with suppress(asyncio.CancelledError):
            await self.tasks[0]


@asynccontextmanager
async def replica(url: str, name: str = "r1", **changes: Any) -> AsyncIterator[Replica]:
    with ThreadPoolExecutor(1) as executor:
        found = Replica(url, name, executor, **changes)
        await found.start()
        try:
            yield found
        finally:
            await found.end()


def client_of(url: str) -> ScoreClient:
    return ScoreClient.connect(url, teacher="tiny", tenant="math")


def named(name: str, token: int = 5, num_response: int = 7) -> ScoreRequest:
    return make_request(rollout_id=name, prompt_token_ids=np.array([token], np.int32), num_response=num_response)


async def gathered(tasks: list["asyncio.Task[ScoreReply]"]) -> list[Any]:
    async with asyncio.timeout(20):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def test_scores_and_handshake_cross_the_queue(redis_url: str) -> None:
    async with replica(redis_url) as served, client_of(redis_url) as client:
        assert await client.info() == served.engine.info()
        requests = [named(f"run.0.{index}") for index in range(30)]
        replies = await gathered([asyncio.create_task(client.score(request)) for request in requests])
        for request, reply in zip(requests, replies, strict=True):
            assert (reply.rollout_id, reply.replica) == (request.rollout_id, "r1")
            np.testing.assert_array_equal(
                reply.scores.sampled_logprobs, (request.response_token_ids / -10).astype(np.float32)
            )
        assert served.readiness.is_ready and client.stats.duplicates == 0


async def test_faults_of_requests_travel_as_themselves_and_touch_nobody(redis_url: str) -> None:
    async with replica(redis_url), client_of(redis_url) as client:
        requests = [
            named("good"),
            named("nan", NAN_ID),
            named("range", 4000),
            replace(named("pinned"), teacher_fingerprint="0" * 16),
        ]
        found = await gathered([asyncio.create_task(client.score(request)) for request in requests])
    assert [type(item) for item in found] == [ScoreReply, NonFiniteError, InvalidRequestError, UnknownTeacherError]
    assert "prompt_token_ids[0]=4000" in found[2].message


@pytest.mark.parametrize(
    ("body", "num_tokens", "message"),
    [
        (b"\xff\xff\xff", 8, "bytes are no ScoreRequest"),
        (encode_request(named("a")), 2, "num_tokens=2: was declared, the body says 8"),
        (encode_request(named("b")), 8, "rollout_id='a': was declared, the body says 'b'"),
        (encode_request(replace(named("a"), tenant="rich")), 8, "tenant='math': was declared, the body says 'rich'"),
    ],
    ids=["junk", "tokens", "rollout", "tenant"],
)
async def test_a_body_that_is_not_what_was_declared_is_refused(
    redis_url: str, body: bytes, num_tokens: int, message: str
) -> None:
    async with replica(redis_url):
        client = await QueueScoreClient.connect(redis_url, pool="tiny", tenant="math")
        try:
            with pytest.raises(InvalidRequestError, match=message):
                await client.score(rollout_id="a", num_tokens=num_tokens, timeout_ms=5000, body=body)
        finally:
            await client.close()


async def test_messages_over_the_published_limit_are_refused_by_number_on_either_side(redis_url: str) -> None:
    limits = GrpcSettings(max_message_bytes=2_000)
    large = named("large", num_response=9_000)
    async with replica(redis_url, grpc=limits) as served:
        async with client_of(redis_url) as client:
            with pytest.raises(InvalidRequestError, match=r"rollout large: 79\d\d bytes, a message holds 2000"):
                await client.score(large)
            await client.score(named("small"))
        # Past the client's own check it is the replica that refuses, before it reads a byte of it.
        raw = await QueueScoreClient.connect(redis_url, pool="tiny", tenant="math")
        with pytest.raises(InvalidRequestError, match=r"body of 79\d\d bytes is above the limit of 2000"):
            await raw.score(rollout_id="large", num_tokens=9_001, timeout_ms=5000, body=encode_request(large))
        await raw.close()
        assert served.engine.scored == [["small"]]


async def test_an_answer_over_the_limit_is_refused_by_number(redis_url: str) -> None:
    # What the check before scoring cannot foresee: names longer than it allows for.
    async with (
        replica(redis_url, "r" * 3_000, grpc=GrpcSettings(max_message_bytes=2_000)),
        client_of(redis_url) as client,
    ):
        with pytest.raises(InvalidRequestError, match=r"rollout a: 30\d\d bytes, a message holds 2000"):
            await client.score(named("a"))


async def test_what_a_dead_replica_held_is_scored_again_and_alone(redis_url: str) -> None:
    async with client_of(redis_url) as client:
        dead = await ScoreConsumer.connect(redis_url, pool="tiny", name="dead", rules=LeaseRules(lease_ms=300))
        calls = [asyncio.create_task(client.score(named(name))) for name in ("x", "y")]
        taken = await dead.take(token_budget=100, wait_s=5.0)
        while len(taken) < 2:
            taken += await dead.take(token_budget=100, wait_s=5.0)
        await dead._connection.close()
        async with replica(redis_url) as served:
            calls += [asyncio.create_task(client.score(named(name))) for name in ("a", "b", "c")]
            replies = await gathered(calls)
            assert [reply.rollout_id for reply in replies] == ["x", "y", "a", "b", "c"]
            assert ["x"] in served.engine.scored and ["y"] in served.engine.scored


async def test_leases_live_as_long_as_the_engine_works(redis_url: str) -> None:
    async with replica(redis_url, "slow") as slow, client_of(redis_url) as client:
        slow.engine.gate.clear()
        call = asyncio.create_task(client.score(named("a")))
        await until(lambda: slow.engine.scored == [["a"]])
        async with replica(redis_url, "idle") as idle:
            await asyncio.sleep(1.5)
            assert idle.engine.scored == [], "three leases have passed and it is still the first one's"
        slow.engine.gate.set()
        assert (await call).replica == "slow"


async def test_a_standing_engine_lets_its_leases_go_and_answers_nothing_twice(redis_url: str) -> None:
    async with replica(redis_url, "stuck", stall_s=0.3) as stuck, client_of(redis_url) as client:
        stuck.engine.gate.clear()
        call = asyncio.create_task(client.score(named("a")))
        await until(lambda: stuck.engine.scored == [["a"]])
        async with replica(redis_url, "healthy"):
            assert (await asyncio.wait_for(call, 10)).replica == "healthy"
            stuck.engine.gate.set()
            await until(lambda: stuck.scoring.num_in_flight == 0)
            assert (await client.score(named("b"))).rollout_id == "b"
        assert client.stats.duplicates == 0 and client.stats.scored == 2


async def test_an_unsound_replica_hands_back_and_scores_nothing(redis_url: str) -> None:
    async with replica(redis_url, "sick") as sick, client_of(redis_url) as client:
        sick.engine.is_broken = True
        call = asyncio.create_task(client.score(named("a")))
        await until(lambda: not sick.readiness.is_ready)
        other = asyncio.create_task(client.score(named("b")))
        async with replica(redis_url, "sound"):
            replies = await gathered([call, other])
            assert [reply.replica for reply in replies] == ["sound", "sound"]
        # A take that was already waiting may still bring the first one again and the second one; both go back at once.
        assert sick.engine.scored == [["a"]] and 1 <= sick.intake.num_handed_back <= 3


async def test_a_sick_replica_that_recovers_goes_on(redis_url: str) -> None:
    async with replica(redis_url) as served, client_of(redis_url) as client:
        served.engine.is_broken = True
        call = asyncio.create_task(client.score(named("a")))
        await until(lambda: not served.readiness.is_ready)
        served.engine.is_broken = False
        await served.scoring.check_canary()
        assert (await asyncio.wait_for(call, 10)).rollout_id == "a"


async def test_stopping_hands_back_what_has_not_begun_and_finishes_what_has(redis_url: str) -> None:
    async with client_of(redis_url) as client, replica(redis_url, "leaving", max_batch_tokens=8) as leaving:
        leaving.engine.gate.clear()
        calls = [asyncio.create_task(client.score(named("begun")))]
        await until(lambda: leaving.engine.scored == [["begun"]])
        calls.append(asyncio.create_task(client.score(named("waiting"))))
        await until(lambda: leaving.scoring.num_in_flight == 2)
        leaving.readiness.hold(Part.SHUTDOWN, "SIGTERM")
        await leaving.stop_taking()
        stopping = asyncio.create_task(leaving.intake.stop(5.0))
        async with replica(redis_url, "staying") as staying:
            assert (await asyncio.wait_for(calls[1], 5)).replica == "staying"
            leaving.engine.gate.set()
            assert await stopping and (await calls[0]).replica == "leaving"
            assert leaving.intake.num_handed_back == 1
            assert staying.engine.scored == [["waiting"]]
        await until(lambda: leaving.scoring.num_in_flight == 0)


async def test_a_bounded_stop_gives_back_even_what_the_engine_is_working_on(redis_url: str) -> None:
    async with client_of(redis_url) as client, replica(redis_url, "leaving") as leaving:
        leaving.engine.gate.clear()
        call = asyncio.create_task(client.score(named("begun")))
        await until(lambda: leaving.engine.scored == [["begun"]])
        await leaving.stop_taking()
        assert not await leaving.intake.stop(0.1)
        assert leaving.intake.num_handed_back == 1
        async with replica(redis_url, "staying"):
            assert (await asyncio.wait_for(call, 10)).replica == "staying"


async def test_no_more_is_held_than_the_batches_ahead(redis_url: str) -> None:
    async with replica(redis_url, max_batch_tokens=16) as served, client_of(redis_url) as client:
        served.engine.gate.clear()
        calls = [asyncio.create_task(client.score(named(f"r{index}"))) for index in range(20)]
        await until(lambda: served.scoring.num_in_flight >= 3)
        await asyncio.sleep(0.3)
        assert served.scoring.num_in_flight * 8 <= 2 * 16
        served.engine.gate.set()
        assert all(isinstance(reply, ScoreReply) for reply in await gathered(calls))


async def test_a_full_replica_takes_a_newcomers_first_request_and_no_more(redis_url: str) -> None:
    newcomer = ScoreClient.connect(redis_url, teacher="tiny", tenant="new")
    async with replica(redis_url, max_batch_tokens=16) as served, client_of(redis_url) as client, newcomer:
        served.engine.gate.clear()
        calls = [asyncio.create_task(client.score(named(f"r{index}"))) for index in range(20)]
        await until(lambda: served.scoring.num_in_flight == 4)
        calls += [asyncio.create_task(newcomer.score(replace(named(name), tenant="new"))) for name in ("n1", "n2")]
        await until(lambda: served.scoring.num_in_flight == 5)
        await asyncio.sleep(0.3)
        assert served.scoring.num_in_flight == 5
        served.engine.gate.set()
        assert all(isinstance(reply, ScoreReply) for reply in await gathered(calls))
        assert "n1" in [name for batch in served.engine.scored[:4] for name in batch]


async def test_a_lost_redis_makes_the_replica_not_ready_and_is_survived(make_redis: MakeRedis) -> None:
    redis = make_redis()
    async with replica(redis.url) as served, client_of(redis.url) as client:
        assert (await client.score(named("before"))).rollout_id == "before"
        redis.kill()
        await until(lambda: not served.readiness.is_ready)
        assert "redis" in served.readiness.describe() and served.readiness.why_not_scoring() == ""
        call = asyncio.create_task(client.score(named("during")))
        await asyncio.sleep(0.3)
        redis.start()
        assert (await asyncio.wait_for(call, 20)).rollout_id == "during"
        await until(lambda: served.readiness.is_ready)
        assert not any(task.done() for task in served.tasks)


async def test_an_unreachable_or_evicting_redis_is_one_line_at_the_start(make_redis: MakeRedis) -> None:
    redis = make_redis("maxmemory-policy allkeys-lru")
    with pytest.raises(OpdError, match="maxmemory-policy=allkeys-lru could evict"):
        async with replica(redis.url):
            pass
    redis.stop()
    with pytest.raises(OpdError, match="not reachable") as caught:
        async with replica(redis.url):
            pass
    assert "\n" not in caught.value.message


async def test_limits_and_a_pool_per_fingerprint_are_published_when_asked(redis_url: str) -> None:
    tenant = Tenant(token_sha256=("0" * 64,), weight=2.0, max_inflight_tokens=50)
    async with replica(redis_url, queue={"per_fingerprint": True}) as served:
        served.intake.follow(TenantTable({"math": tenant}))
        assert served.intake.pool == f"tiny@{'f' * 16}"
        connection = QueueConnection(redis_url)
        await connection.open()
        try:
            from opd.queue.pools import promote_pool

            await promote_pool(connection, "tiny", served.intake.pool)
            limits = PoolKeys(served.intake.pool).limits
            async with asyncio.timeout(10):
                while not (found := await connection.call(lambda redis: redis.hgetall(limits))):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert found == {b"weight:math": b"2.0", b"cap:math": b"50"}
            # A Redis that lost them has them again with the next sign of life.
            await connection.call(lambda redis: redis.delete(limits))
            async with asyncio.timeout(10):
                while await connection.call(lambda redis: redis.hgetall(limits)) != found:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            await connection.close()
        async with client_of(redis_url) as client:
            assert (await client.score(named("a"))).rollout_id == "a"
            with pytest.raises(OpdError, match="50"):
                await client.score(named("large", num_response=80))
