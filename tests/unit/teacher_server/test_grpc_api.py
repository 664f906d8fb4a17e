import asyncio
import re
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from opd.errors import (
    ConfigError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    OverCapacityError,
    TeacherUnavailableError,
    UnknownTeacherError,
)
from opd.metrics import TeacherMetrics
from opd.rpc.client import GrpcScoreClient
from opd.rpc.status import error_from_rpc
from opd.types import Encoding
from opd.wire.messages import request_to_proto
from opd.wire.pb import teacher_pb2 as pb
from opd.wire.pb.teacher_pb2_grpc import TeacherServiceStub
from services.teacher_server.batcher import BatchLimits, FairBatcher
from services.teacher_server.canary import Canary
from services.teacher_server.config import GrpcSettings
from services.teacher_server.grpc_api import SERVICE, GrpcServer
from services.teacher_server.guarded_engine import GuardedEngine
from services.teacher_server.readiness import Part, Readiness
from services.teacher_server.scoring import ScoringSlot, TeacherScoring
from tests.unit.teacher_server.fake_engine import CRASH_ID, FakeEngine, fake_info, until
from tests.unit.teacher_server.tiny_teachers import make_request


class Service:
    def __init__(self, settings: GrpcSettings, limits: BatchLimits, executor: ThreadPoolExecutor, replica: str) -> None:
        self.engine = FakeEngine(fake_info(max_message_bytes=settings.max_message_bytes, max_context=100_000))
        canary = Canary(self.engine)
        assert canary.check().is_sound
        self.readiness, self.metrics = Readiness(), TeacherMetrics()
        self.scoring = TeacherScoring(
            GuardedEngine(self.engine, canary),
            FairBatcher(limits),
            executor,
            readiness=self.readiness,
            metrics=self.metrics,
            replica=replica,
            linger_s=0.0,
        )
        self.slot = ScoringSlot()
        self.slot.fill(self.scoring)
        self.server = GrpcServer(settings, self.slot, self.readiness, metrics=self.metrics)
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@asynccontextmanager
async def serving(
    settings: GrpcSettings | None = None, limits: BatchLimits | None = None, replica: str = "r1"
) -> AsyncIterator[tuple[Service, GrpcScoreClient]]:
    with ThreadPoolExecutor(1) as executor:
        service = Service(settings or GrpcSettings(), limits or BatchLimits(), executor, replica)
        loop = asyncio.create_task(service.scoring.run())
        service.port = await service.server.start()
        service.readiness.clear(Part.START)
        try:
            async with GrpcScoreClient(service.address) as client:
                yield service, client
        finally:
            service.engine.gate.set()
            await service.server.stop(1.0)
            loop.cancel()
            with suppress(asyncio.CancelledError):
                await loop


async def test_scores_and_handshake_cross_the_wire() -> None:
    async with serving() as (service, client):
        assert await client.info() == service.engine.info()
        request = make_request(3)
        reply = await client.score(request)
    assert reply.rollout_id == request.rollout_id and reply.replica == "r1"
    np.testing.assert_array_equal(reply.scores.sampled_logprobs, (request.response_token_ids / -10).astype(np.float32))


async def test_half_precision_is_asked_for_per_request() -> None:
    async with serving() as (_, client):
        request = make_request(3, encoding=Encoding.FLOAT16)
        reply = await client.score(request)
    expected = (request.response_token_ids / -10).astype(np.float32).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(reply.scores.sampled_logprobs, expected)


async def test_many_callers_at_once_share_batches_and_get_their_own_answers() -> None:
    async with serving() as (service, client):
        requests = [make_request(seed, prompt_token_ids=np.array([5], np.int32)) for seed in range(60)]
        service.engine.gate.clear()
        calls = [asyncio.create_task(client.score(request)) for request in requests]
        await until(lambda: service.scoring.num_in_flight == len(requests))
        service.engine.gate.set()
        replies = await asyncio.gather(*calls)
    assert [reply.rollout_id for reply in replies] == [request.rollout_id for request in requests]
    assert len(service.engine.scored) < 60


async def test_errors_arrive_as_the_class_they_left_as() -> None:
    async with serving() as (_, client):
        with pytest.raises(InvalidRequestError, match=r"prompt_token_ids\[0\]=90: ids are 0 to 89"):
            await client.score(make_request(prompt_token_ids=np.array([90], np.int32)))
        with pytest.raises(UnknownTeacherError, match="teacher='other': this replica serves 'tiny'"):
            await client.score(make_request(teacher="other"))
        with pytest.raises(InternalError, match="the engine fails on this request") as caught:
            await client.score(make_request(prompt_token_ids=np.array([CRASH_ID], np.int32)))
        assert "device-side assert" not in caught.value.message


async def test_over_the_cap_callers_get_resource_exhausted_with_a_delay() -> None:
    async with serving(limits=BatchLimits(max_tenant_tokens=20)) as (service, client):
        service.engine.gate.clear()
        first = asyncio.create_task(client.score(make_request(1)))
        await until(lambda: len(service.engine.scored) > 0)
        async with grpc.aio.insecure_channel(service.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raw:
                await TeacherServiceStub(channel).Score(request_to_proto(make_request(2)))
        assert raw.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        metadata = dict(raw.value.trailing_metadata())
        assert metadata["opd-code"] == "over_capacity" and int(metadata["opd-retry-after-ms"]) > 0
        with pytest.raises(OverCapacityError, match="already hold 12 of 20") as caught:
            await client.score(make_request(2))
        assert caught.value.retry_after_s is not None
        service.engine.gate.set()
        await first


async def test_a_message_over_the_limit_is_refused_by_number_on_either_side() -> None:
    settings = GrpcSettings(max_message_bytes=5_000)
    large = make_request(num_response=9_000)
    async with serving(settings) as (service, client):
        # Seven bits an id; the client knows the limit although nobody asked for the handshake.
        with pytest.raises(InvalidRequestError, match=r"rollout run\.0\.0: 79\d\d bytes, a message holds 5000"):
            await client.score(large)
        assert service.engine.scored == []
        await client.score(make_request(1))
        async with grpc.aio.insecure_channel(service.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raw:
                await TeacherServiceStub(channel).Score(request_to_proto(large))
        refusal = error_from_rpc(raw.value, service.address)
        assert isinstance(refusal, InvalidRequestError) and re.search(r"\(79\d\d vs\. 5000\)", refusal.message)


async def test_an_answer_over_the_limit_is_refused_by_number_and_is_no_fault_of_grpc() -> None:
    # What the check before scoring cannot foresee: names longer than it allows for.
    async with serving(GrpcSettings(max_message_bytes=2_000), replica="r" * 3_000) as (_, client):
        with pytest.raises(InvalidRequestError, match=r"rollout run\.0\.1: 30\d\d bytes, a message holds 2000"):
            await client.score(make_request(1))


async def test_an_answer_over_the_callers_own_limit_is_refused_by_number() -> None:
    async with (
        serving(replica="r" * 3_000) as (service, _),
        GrpcScoreClient(service.address, max_message_bytes=2_000) as client,
    ):
        with pytest.raises(InvalidRequestError, match=r"larger than max \(30\d\d vs\. 2000\)"):
            await client.score(make_request(1))


async def test_the_callers_deadline_is_passed_on_and_frees_the_ledger() -> None:
    async with serving() as (service, client):
        service.engine.gate.clear()
        blocker = asyncio.create_task(client.score(make_request(1)))
        await until(lambda: len(service.engine.scored) > 0)
        with pytest.raises(DeadlineExceededError):
            await client.score(make_request(2, timeout_ms=100))
        await until(lambda: service.scoring.num_in_flight == 1)
        service.engine.gate.set()
        await blocker
    assert service.engine.scored == [["run.0.1"]]


async def test_a_tool_that_says_nothing_of_time_is_bound_by_the_requests_own() -> None:
    async with serving() as (service, _):
        service.engine.gate.clear()
        async with grpc.aio.insecure_channel(service.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raw:
                await TeacherServiceStub(channel).Score(request_to_proto(make_request(2, timeout_ms=80)))
        assert raw.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED and "timeout_ms=80" in raw.value.details()


async def test_what_needs_hidden_states_is_unimplemented_in_so_many_words() -> None:
    async with serving() as (service, _), grpc.aio.insecure_channel(service.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raw:
            async for _ in TeacherServiceStub(channel).GetOutputHead(pb.GetOutputHeadRequest()):
                pass
    assert raw.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "does not serve hidden states; set hidden_states.enabled=true" in raw.value.details()
    assert dict(raw.value.trailing_metadata())["opd-code"] == "unsupported"


async def test_another_teachers_info_is_refused() -> None:
    async with serving() as (service, _), grpc.aio.insecure_channel(service.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raw:
            await TeacherServiceStub(channel).GetInfo(pb.GetInfoRequest(teacher="big"))
    assert raw.value.code() is grpc.StatusCode.NOT_FOUND


async def health_of(channel: Any, service: str) -> int:
    response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(response.status)


async def test_health_follows_readiness() -> None:
    serves, serves_not = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with serving() as (service, _), grpc.aio.insecure_channel(service.address) as channel:
        assert [await health_of(channel, name) for name in ("", SERVICE)] == [serves, serves]
        service.readiness.hold(Part.CANARY, "drifted")
        await asyncio.sleep(0.01)
        assert await health_of(channel, SERVICE) == serves_not
        with pytest.raises(grpc.aio.AioRpcError) as raw:
            await TeacherServiceStub(channel).Score(request_to_proto(make_request(2)))
        assert raw.value.code() is grpc.StatusCode.UNAVAILABLE and "drifted" in raw.value.details()
        service.readiness.clear(Part.CANARY)
        await asyncio.sleep(0.01)
        assert await health_of(channel, SERVICE) == serves


async def test_reflection_lists_the_services() -> None:
    async with serving() as (service, _), grpc.aio.insecure_channel(service.address) as channel:
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        async for answer in stub.ServerReflectionInfo(iter([asked])):
            names = {found.name for found in answer.list_services_response.service}
            break
    assert {SERVICE, "grpc.health.v1.Health"} <= names


async def test_a_taken_port_is_one_line() -> None:
    async with serving() as (service, _):
        settings = GrpcSettings(port=service.port)
        second = GrpcServer(settings, service.slot, service.readiness, metrics=service.metrics)
        with pytest.raises(ConfigError, match=rf"grpc\.port={service.port}: cannot listen"):
            await second.start()
        await second.stop(0)


async def test_nobody_there_is_retryable_and_a_url_of_another_kind_is_refused() -> None:
    async with GrpcScoreClient("127.0.0.1:1") as client:
        with pytest.raises(TeacherUnavailableError, match=r"teacher at 127\.0\.0\.1:1: unavailable"):
            await client.score(make_request(1, timeout_ms=5000))
    with pytest.raises(ConfigError, match="is no gRPC address"):
        GrpcScoreClient("redis://host")


async def test_stopping_lets_calls_under_way_finish() -> None:
    async with serving() as (service, client):
        service.engine.gate.clear()
        call = asyncio.create_task(client.score(make_request(1)))
        await until(lambda: len(service.engine.scored) > 0)
        stopping = asyncio.create_task(service.server.stop(5.0))
        await asyncio.sleep(0.05)
        service.engine.gate.set()
        assert (await call).rollout_id == "run.0.1"
        await stopping
