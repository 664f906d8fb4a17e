"""Log lines and spans of requests over real gRPC and HTTP: they name the request, and say how it ended."""

import asyncio
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from opd.errors import InternalError, OpdError, PermissionDeniedError, UnauthenticatedError
from opd.wire.messages import request_to_proto
from opd.wire.pb import teacher_pb2 as pb
from opd.wire.pb.teacher_pb2_grpc import TeacherServiceStub
from tests.observers import PARENT, PARENT_SPAN, PARENT_TRACE, JsonLog, Traced, counted_errors, log, traced
from tests.unit.teacher_server.fake_engine import CRASH_ID, until
from tests.unit.teacher_server.test_gate import MATH, client_of, plain_http, serving
from tests.unit.teacher_server.test_grpc_api import serving as serving_grpc
from tests.unit.teacher_server.test_grpc_hidden_states import serving_hidden
from tests.unit.teacher_server.tiny_teachers import make_request

__all__ = ["log", "traced"]
HEADERS = {"authorization": f"Bearer {MATH}", "traceparent": PARENT}
BODY = {"prompt_token_ids": [1], "response_token_ids": [2], "rollout_id": "run.7.1"}
# The connection takes little at once, so that the rest of a reply waits for its reader.
NARROW = [("grpc.http2.lookahead_bytes", 65_536), ("grpc.http2.bdp_probe", 0)]
PARTS = {"serve", "intake", "batch_wait", "engine_pass", "reply"}


async def test_an_engines_traceback_names_whom_it_is_about(log: JsonLog) -> None:
    async with serving_grpc() as (service, client):
        service.engine.gate.clear()
        first = asyncio.create_task(client.score(make_request(1)))
        await until(lambda: len(service.engine.scored) > 0)
        poison = make_request(rollout_id="run.4.2", prompt_token_ids=np.array([CRASH_ID], np.int32))
        calls = [asyncio.create_task(client.score(request)) for request in (poison, make_request(3, tenant="code"))]
        await until(lambda: service.scoring.num_in_flight == 3)
        service.engine.gate.set()
        await first
        found = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(found[0], InternalError) and not isinstance(found[1], BaseException)
    (refused,) = log.matching("^refused ")
    together, alone = log.matching("^the engine failed on a batch")
    assert "device-side assert" in together["traceback"] and "device-side assert" in alone["traceback"]
    named = {name: refused[name] for name in ("request", "rollout", "tenant", "policy_version")}
    assert named == {"request": refused["request"], "rollout": "run.4.2", "tenant": "math", "policy_version": 4}
    assert {name: alone[name] for name in named} == named
    assert "run.4.2 of math" in alone["message"]
    assert (set(together["rollouts"]), set(together["tenants"])) == ({"run.4.2", "run.0.3"}, {"math", "code"})
    assert refused["request"] in together["requests"] and len(set(together["requests"])) == 2


@pytest.mark.parametrize("shell", ["grpc", "http"])
async def test_a_fault_of_ours_names_its_request(tmp_path: Path, log: JsonLog, shell: str) -> None:
    async with serving(tmp_path) as service, client_of(service) as client, plain_http(service) as http:
        await client.info()
        service.engine._info = None  # type: ignore[assignment]
        if shell == "grpc":
            with pytest.raises(InternalError, match=r"^rollout run\.7\.1: a fault of the teacher's; its log"):
                await client.score(make_request(rollout_id="run.7.1"))
        else:
            assert (await http.post("/v1/score", json=BODY, headers=HEADERS)).status_code == 500
    (fault,) = [line for line in log.lines if "traceback" in line]
    (refused,) = log.matching("^refused ")
    assert "AttributeError" in fault["traceback"] and fault["request"] in fault["message"]
    assert (fault["request"], fault["tenant"]) == (refused["request"], "math")
    assert fault["rollout"] == refused["rollout"] == "run.7.1" and refused["code"] == "internal"


async def test_http_has_the_lines_that_grpc_has(tmp_path: Path, log: JsonLog) -> None:
    async with serving(tmp_path) as service, client_of(service) as client, plain_http(service) as http:
        await client.score(make_request(rollout_id="run.7.1"))
        assert (await http.post("/v1/score", json=BODY, headers=HEADERS)).status_code == 200
    of_grpc, of_http = log.matching("^scored ")
    for line in (of_grpc, of_http):
        assert (line["message"], line["rollout"], line["tenant"]) == ("scored run.7.1 of math", "run.7.1", "math")
        assert line["policy_version"] == 7 and line["engine_ms"] >= 0
    assert of_grpc.keys() == of_http.keys() and of_grpc["request"] != of_http["request"]


async def test_whoever_is_refused_at_the_gate_has_a_line(tmp_path: Path, log: JsonLog) -> None:
    async with serving(tmp_path) as service, plain_http(service) as http:
        async with client_of(service, "wrong") as nobody, client_of(service) as math:
            with pytest.raises(UnauthenticatedError):
                await nobody.info()
            with pytest.raises(PermissionDeniedError):
                await math.score(make_request(rollout_id="run.7.1", tenant="code"))
        await http.post("/v1/score", json=BODY)
        await http.get("/v1/none%0aforged", headers=HEADERS)
    lines = log.matching("^refused ")
    assert [(line["code"], line.get("rollout"), line.get("tenant")) for line in lines] == [
        ("unauthenticated", None, None),
        ("permission_denied", "run.7.1", "math"),
        ("unauthenticated", None, None),
        ("invalid_request", None, "math"),
    ]
    assert [line["message"].partition(":")[0] for line in lines] == [
        "refused GetInfo",
        "refused run.7.1 of math",
        "refused POST /v1/score",
        "refused GET /v1/none%0Aforged of math",
    ]
    assert len({line["request"] for line in lines}) == 4


async def test_scoring_over_http_is_a_part_of_the_callers_trace(tmp_path: Path, traced: Traced) -> None:
    async with serving(tmp_path) as service, plain_http(service) as http:
        assert (await http.post("/v1/score", json=BODY, headers=HEADERS)).status_code == 200
    spans = traced.by_name()
    assert spans.keys() == PARTS
    assert (spans["serve"].trace_id, spans["serve"].parent_id) == (PARENT_TRACE, PARENT_SPAN)
    assert all(spans[name].parent_id == spans["serve"].span_id for name in PARTS - {"serve"})
    assert spans["serve"].attributes == {"rollout": "run.7.1", "tenant": "math", "tokens": 2}
    assert not any(span.error for span in spans.values())


@pytest.mark.parametrize(
    ("changes", "headers", "code", "names"),
    [
        ({"tenant": "code"}, {}, "permission_denied", {"serve"}),
        ({"response_token_ids": [4000]}, {}, "invalid_request", {"serve", "intake"}),
        ({"prompt_token_ids": [CRASH_ID]}, {}, "internal", {"serve", "intake", "batch_wait", "engine_pass"}),
    ],
)
async def test_a_refusal_over_http_marks_its_span(
    tmp_path: Path,
    traced: Traced,
    changes: dict[str, object],
    headers: dict[str, str],
    code: str,
    names: set[str],
) -> None:
    async with serving(tmp_path) as service, plain_http(service) as http:
        await http.post("/v1/score", json=BODY | changes, headers=HEADERS | headers)
    spans = traced.by_name()
    assert spans.keys() == names and spans["serve"].error == code


@pytest.mark.parametrize(
    ("method", "path", "token", "status"),
    [
        ("POST", "/v1/score", "wrong", 401),
        ("POST", "/v1/score", None, 401),
        ("GET", "/nowhere", "wrong", 401),
        ("POST", "/healthz", None, 405),
        ("POST", "/metrics", None, 405),
    ],
)
async def test_a_stranger_makes_no_span(
    tmp_path: Path, traced: Traced, log: JsonLog, method: str, path: str, token: str | None, status: int
) -> None:
    headers = {"traceparent": PARENT} | ({} if token is None else {"authorization": f"Bearer {token}"})
    async with serving(tmp_path) as service, plain_http(service) as http:
        body = BODY if method == "POST" else None
        assert (await http.request(method, path, json=body, headers=headers)).status_code == status
        assert sum(counted_errors(service.metrics.render().decode()).values()) == 1
    assert len(log.matching("^refused ")) == 1
    assert traced.spans() == []


async def test_a_refusal_at_the_gate_of_grpc_marks_its_span(tmp_path: Path, traced: Traced) -> None:
    async with serving(tmp_path) as service, client_of(service) as client:
        with pytest.raises(OpdError):
            await client.score(make_request(rollout_id="run.7.1", tenant="code", traceparent=PARENT))
    (span,) = traced.spans()
    assert (span.name, span.parent_id, span.error) == ("serve", PARENT_SPAN, "permission_denied")
    assert span.attributes == {"rollout": "run.7.1", "tenant": "math"}


async def test_a_fault_of_ours_marks_its_span(traced: Traced) -> None:
    async with serving_grpc() as (service, client):
        # An answer whose scores are none.
        service.engine._one = lambda request: object()  # type: ignore[method-assign, return-value, assignment]
        with pytest.raises(InternalError):
            await asyncio.wait_for(client.score(make_request(traceparent=PARENT, timeout_ms=2000)), 10)
    assert traced.by_name()["serve"].error == "internal"


async def test_a_caller_that_leaves_marks_its_span(traced: Traced) -> None:
    async with serving_grpc() as (service, client):
        service.engine.gate.clear()
        call = asyncio.create_task(client.score(make_request(traceparent=PARENT)))
        await until(lambda: service.scoring.num_in_flight == 1)
        call.cancel()
        await until(lambda: service.scoring.num_in_flight == 0)
        service.engine.gate.set()
        assert counted_errors(service.metrics.render().decode()) == {}
    assert traced.by_name()["serve"].error == "CancelledError"


async def test_a_stream_is_served_until_its_last_chunk(
    monkeypatch: pytest.MonkeyPatch, traced: Traced, log: JsonLog
) -> None:
    async with (
        serving_hidden(monkeypatch) as (service, address),
        grpc.aio.insecure_channel(address, options=NARROW) as channel,
    ):
        request = make_request(3, num_response=50_000, wants_hidden_states=True, traceparent=PARENT)
        call = TeacherServiceStub(channel).ScoreStream(pb.ScoreStreamRequest(request=request_to_proto(request)))
        await call.read()
        await asyncio.sleep(0.3)
        assert log.matching("^scored ") == []
        read_on_ns = time.time_ns()
        while not (await call.read()).is_last:
            pass
        await until(lambda: service.scoring.num_in_flight == 0)
    assert len(log.matching("^scored run.0.3 of math")) == 1
    spans = traced.by_name()
    assert spans.keys() == PARTS and not any(span.error for span in spans.values())
    assert spans["reply"].start_ns < read_on_ns < spans["reply"].end_ns <= spans["serve"].end_ns


async def test_a_reader_who_never_reads_is_refused_in_time_and_holds_nothing(
    monkeypatch: pytest.MonkeyPatch, traced: Traced
) -> None:
    async with (
        serving_hidden(monkeypatch) as (service, address),
        grpc.aio.insecure_channel(address, options=NARROW) as channel,
    ):
        request = make_request(3, num_response=50_000, wants_hidden_states=True, traceparent=PARENT, timeout_ms=1500)
        call = TeacherServiceStub(channel).ScoreStream(pb.ScoreStreamRequest(request=request_to_proto(request)))
        await call.read()
        await asyncio.sleep(1.6)
        await until(lambda: service.scoring.num_in_flight == 0)
        assert counted_errors(service.metrics.render().decode()) == {"deadline_exceeded": 1}
        with pytest.raises(grpc.aio.AioRpcError) as raw:
            while True:
                await call.read()
        assert raw.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "was not read in time" in raw.value.details()
    assert traced.by_name()["serve"].error == "deadline_exceeded"


async def test_the_wait_for_the_engines_turn_is_no_part_of_the_pass(traced: Traced) -> None:
    async with serving_grpc() as (service, client):
        service.engine.gate.clear()
        probe = asyncio.create_task(service.scoring.check_canary())
        await until(lambda: service.scoring.is_engine_busy)
        call = asyncio.create_task(client.score(make_request(traceparent=PARENT)))
        await until(lambda: service.scoring.num_in_flight == 1)
        await asyncio.sleep(0.4)
        service.engine.gate.set()
        reply = await call
        await probe
    assert reply.queue_ms >= 350 and reply.engine_ms < 300
    spans = traced.by_name()
    waited, computed = spans["batch_wait"], spans["engine_pass"]
    assert waited.end_ns - waited.start_ns >= 350e6 and waited.attributes["waited_s"] >= 0.35
    assert computed.end_ns - computed.start_ns < 300e6 and computed.start_ns >= waited.end_ns
