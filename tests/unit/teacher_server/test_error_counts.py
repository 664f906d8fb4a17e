"""Every request that is answered with an error is counted once, by the code it was told: over real gRPC and HTTP."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from opd.errors import OpdError, OverCapacityError
from opd.rpc.status import error_from_rpc
from opd.wire.messages import request_to_proto
from opd.wire.pb import teacher_pb2 as pb
from opd.wire.pb.teacher_pb2_grpc import TeacherServiceStub
from services.teacher_server.config import GrpcSettings, HttpSettings
from services.teacher_server.readiness import Part
from tests.observers import counted_errors
from tests.unit.teacher_server.fake_engine import CRASH_ID, NAN_ID, until
from tests.unit.teacher_server.test_gate import CODE, MATH, Service, client_of, plain_http, serving
from tests.unit.teacher_server.test_grpc_api import serving as serving_grpc
from tests.unit.teacher_server.test_grpc_hidden_states import serving_hidden
from tests.unit.teacher_server.tiny_teachers import make_request

SCORE = "/opd.v1.TeacherService/Score"
WITH_TOKEN = (("authorization", f"Bearer {MATH}"),)


async def counts(service: Service) -> dict[str, int]:
    """As a scrape sees them."""
    async with plain_http(service) as client:
        return counted_errors((await client.get("/metrics")).text)


def of_token(token: int) -> Any:
    return make_request(prompt_token_ids=np.array([token], np.int32))


async def without_a_token(service: Service) -> Any:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        metadata = (("authorization", "Bearer wrong"),)
        await TeacherServiceStub(channel).Score(request_to_proto(make_request()), metadata=metadata)


async def the_handshake_without_a_token(service: Service) -> Any:
    async with client_of(service, None) as client:
        await client.info()


async def a_head_without_the_right(service: Service) -> Any:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        async for _ in TeacherServiceStub(channel).GetOutputHead(pb.GetOutputHeadRequest(), metadata=WITH_TOKEN):
            pass


async def no_message(service: Service) -> Any:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        await channel.unary_unary(SCORE)(b"\xff\xff not a message", metadata=WITH_TOKEN)


async def no_message_for_a_stream(service: Service) -> Any:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        call = channel.unary_stream("/opd.v1.TeacherService/ScoreStream")(b"\xff\xff", metadata=WITH_TOKEN)
        await call.read()


def asking(**changes: Any) -> Callable[[Service], Awaitable[Any]]:
    async def ask(service: Service) -> Any:
        async with client_of(service) as client:
            await client.score(make_request(**changes))

    return ask


async def a_fault(service: Service) -> Any:
    # No info, and so nothing to compare a request with.
    async with client_of(service) as client:
        await client.info()
        service.engine._info = None  # type: ignore[assignment]
        await client.score(make_request())


async def a_fault_in_a_stream(service: Service) -> Any:
    service.engine._info = None  # type: ignore[assignment]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        message = pb.ScoreStreamRequest(request=request_to_proto(make_request()))
        await TeacherServiceStub(channel).ScoreStream(message, metadata=WITH_TOKEN).read()


OVER_GRPC = [
    (without_a_token, "unauthenticated"),
    (the_handshake_without_a_token, "unauthenticated"),
    (a_head_without_the_right, "permission_denied"),
    (asking(tenant="code"), "permission_denied"),
    (no_message, "invalid_request"),
    (no_message_for_a_stream, "invalid_request"),
    (asking(prompt_token_ids=np.array([4000], np.int32)), "invalid_request"),
    (asking(teacher="other"), "unknown_teacher"),
    (asking(prompt_token_ids=np.array([NAN_ID], np.int32)), "non_finite"),
    (asking(prompt_token_ids=np.array([CRASH_ID], np.int32)), "internal"),
    (a_fault, "internal"),
    (a_fault_in_a_stream, "internal"),
]


@pytest.mark.parametrize(
    ("ask", "code"), OVER_GRPC, ids=[f"{number}-{code}" for number, (_, code) in enumerate(OVER_GRPC)]
)
async def test_over_grpc_an_error_counts_once(
    tmp_path: Path, ask: Callable[[Service], Awaitable[Any]], code: str
) -> None:
    async with serving(tmp_path) as service:
        assert await counts(service) == {}
        try:
            await ask(service)
        except OpdError as error:
            told = error
        except grpc.aio.AioRpcError as raw:
            told = error_from_rpc(raw, "t")
        assert told.code == code
        assert await counts(service) == {code: 1}


async def test_what_is_answered_is_no_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, client_of(service) as client:
        await client.score(make_request())
        await client.info()
        assert await counts(service) == {}


BODY = {"prompt_token_ids": [1], "response_token_ids": [2]}
OVER_HTTP = [
    ("POST", "/v1/score", {"json": BODY, "headers": {"authorization": "Bearer wrong"}}, 401, "unauthenticated"),
    ("GET", "/v1/info", {"headers": {}}, 401, "unauthenticated"),
    ("POST", "/v1/score", {"json": BODY | {"tenant": "code"}}, 403, "permission_denied"),
    ("POST", "/v1/score", {"json": BODY | {"prompt_token_ids": [1] * 2000}}, 400, "invalid_request"),
    ("POST", "/v1/score", {"content": b"{no json"}, 400, "invalid_request"),
    ("POST", "/v1/score", {"json": {"prompt_token_ids": [1]}}, 400, "invalid_request"),
    ("POST", "/v1/score", {"json": BODY | {"response_token_ids": [4000]}}, 400, "invalid_request"),
    ("POST", "/v1/score", {"json": BODY | {"response_token_ids": [1 << 40]}}, 400, "invalid_request"),
    ("POST", "/v1/score", {"json": BODY | {"teacher": "other"}}, 404, "unknown_teacher"),
    ("POST", "/v1/score", {"json": BODY | {"prompt_token_ids": [CRASH_ID]}}, 500, "internal"),
    ("GET", "/v1/nothing", {}, 404, "invalid_request"),
]


@pytest.mark.parametrize(("method", "path", "given", "status", "code"), OVER_HTTP)
async def test_over_http_an_error_counts_once(
    tmp_path: Path, method: str, path: str, given: dict[str, Any], status: int, code: str
) -> None:
    options = {"headers": {"authorization": f"Bearer {MATH}"}} | given
    async with serving(tmp_path, http=HttpSettings(max_body_bytes=2048)) as service, plain_http(service) as client:
        answer = await client.request(method, path, **options)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert await counts(service) == {code: 1}


async def test_a_fault_of_ours_over_http_counts_once_and_is_told_without_its_cause(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, plain_http(service) as client:
        service.engine._info = None  # type: ignore[assignment]
        for path in ("/v1/info", "/v1/score"):
            answer = await client.request(
                "GET" if path == "/v1/info" else "POST", path,
                json=BODY, headers={"authorization": f"Bearer {CODE}"},
            )  # fmt: skip
            assert answer.status_code == 500 and "its log has the traceback" in answer.json()["error"]["message"]
        assert await counts(service) == {"internal": 2}


async def test_probes_that_say_no_are_no_errors(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, plain_http(service) as client:
        service.readiness.hold(Part.ENGINE, "it stands still")
        for path in ("/healthz", "/readyz"):
            assert (await client.get(path)).status_code == 503
        assert await counts(service) == {}


async def test_a_passed_deadline_counts_once() -> None:
    async with serving_grpc() as (service, _), grpc.aio.insecure_channel(service.address) as channel:
        service.engine.gate.clear()
        with pytest.raises(grpc.aio.AioRpcError) as raw:
            await TeacherServiceStub(channel).Score(request_to_proto(make_request(timeout_ms=80)))
        assert raw.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert counted_errors(service.metrics.render().decode()) == {"deadline_exceeded": 1}


async def test_calls_over_the_limit_are_typed_counted_and_leave_health_alone() -> None:
    async with serving_grpc(GrpcSettings(max_concurrent_rpcs=1)) as (service, client):
        service.engine.gate.clear()
        first = asyncio.create_task(client.score(make_request(1)))
        await until(lambda: len(service.engine.scored) > 0)
        with pytest.raises(OverCapacityError, match=r"grpc\.max_concurrent_rpcs=1: so many calls") as caught:
            await client.score(make_request(2))
        assert caught.value.retry_after_s == 1.0
        async with grpc.aio.insecure_channel(service.address) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        service.engine.gate.set()
        await first
        await client.score(make_request(3))
        assert counted_errors(service.metrics.render().decode()) == {"over_capacity": 1}


async def test_a_metrics_page_that_is_shut_counts_who_was_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.token").write_text("scrape\n")
    http = HttpSettings(metrics_token_file=tmp_path / "metrics.token")
    async with serving(tmp_path, http=http) as service, plain_http(service) as client:
        assert (await client.get("/metrics")).status_code == 401
        scraped = await client.get("/metrics", headers={"authorization": "Bearer scrape"})
        assert counted_errors(scraped.text) == {"unauthenticated": 1}


def test_the_reader_of_counts_reads_them() -> None:
    assert counted_errors('opd_teacher_errors_total{code="a_b"} 2.0\nopd_teacher_errors_total{code="c"} 0.0\n') == {
        "a_b": 2
    }


async def test_a_caller_of_http_that_leaves_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path) as service:
        service.engine.gate.clear()
        async with plain_http(service) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/score", json=BODY, headers={"authorization": f"Bearer {MATH}"}, timeout=0.3)
        service.engine.gate.set()
        await until(lambda: service.scoring.num_in_flight == 0)
        assert await counts(service) == {}
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("num_read", [0, 1, 3])
async def test_a_caller_that_leaves_a_stream_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_read: int
) -> None:
    async with serving_hidden(monkeypatch) as (service, address), grpc.aio.insecure_channel(address) as channel:
        request = make_request(3, num_response=5000, wants_hidden_states=True)
        for _ in range(5):
            call = TeacherServiceStub(channel).ScoreStream(pb.ScoreStreamRequest(request=request_to_proto(request)))
            for _ in range(num_read):
                await call.read()
            call.cancel()
        await until(lambda: service.scoring.num_in_flight == 0)
        assert counted_errors(service.metrics.render().decode()) == {}
    assert "Traceback" not in caplog.text
