"""ScoreStream and GetOutputHead over a real gRPC server, with an engine that answers what it is told."""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import load_file

from opd.client import ScoreClient
from opd.errors import (
    OpdError,
    OverCapacityError,
    PermissionDeniedError,
    TeacherUnavailableError,
    UnknownTeacherError,
    UnsupportedError,
)
from opd.head_cache import HeadCache
from opd.rpc.client import GrpcScoreClient
from opd.rpc.status import STATUS, trailing_metadata
from opd.types import Capability, ScoreRequest, Scores, SharedHead
from opd.wire.messages import request_to_proto
from opd.wire.pb import teacher_pb2 as pb
from opd.wire.pb.teacher_pb2_grpc import TeacherServiceStub, add_TeacherServiceServicer_to_server
from services.teacher_server.gate import Gate
from services.teacher_server.grpc_api import TeacherServicer
from services.teacher_server.grpc_gate import GateInterceptor
from tests.unit.teacher_server.fake_engine import FakeEngine, fake_info, until
from tests.unit.teacher_server.test_grpc_api import Service, serving
from tests.unit.teacher_server.tiny_teachers import make_request

HIDDEN, VOCAB = 8, 96
WEIGHT = np.random.default_rng(0).standard_normal((VOCAB, HIDDEN)).astype(np.float32)
BIAS = np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32)
HEAD_HASH = hashlib.sha256(WEIGHT.tobytes() + BIAS.tobytes()).hexdigest()


def hidden_of(request: ScoreRequest) -> np.ndarray:
    return np.outer(request.response_token_ids, np.linspace(0.1, 1.0, HIDDEN)).astype(np.float32)


class HiddenEngine(FakeEngine):
    """Answers hidden states made of the response ids, and hands out a head."""

    def __init__(self) -> None:
        super().__init__(
            fake_info(
                capabilities=frozenset(Capability), hidden_size=HIDDEN, vocab_rows=VOCAB, output_head_hash=HEAD_HASH,
                max_context=100_000,
            )
        )  # fmt: skip

    def output_head(self) -> SharedHead:
        return SharedHead(
            weight=memoryview(WEIGHT.tobytes()), bias=BIAS.tobytes(), shape=(VOCAB, HIDDEN), dtype="float32",
            sha256=HEAD_HASH,
        )  # fmt: skip

    def _one(self, request: ScoreRequest) -> Scores | OpdError:
        scores = super()._one(request)
        if isinstance(scores, OpdError) or not request.wants_hidden_states:
            return scores
        return replace(scores, hidden_states=hidden_of(request))


@asynccontextmanager
async def serving_hidden(
    monkeypatch: pytest.MonkeyPatch,
    make_servicer: Callable[..., TeacherServicer] = TeacherServicer,
) -> AsyncIterator[tuple[Service, str]]:
    """The service of the other tests with this engine, and chunks of 200 bytes on a port beside it."""
    monkeypatch.setattr("tests.unit.teacher_server.test_grpc_api.FakeEngine", lambda _info: HiddenEngine())
    async with serving() as (service, _):
        server = grpc.aio.server(interceptors=(GateInterceptor(Gate(), service.metrics, max_calls=100),))
        servicer = make_servicer(service.slot, chunk_bytes=200)
        add_TeacherServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield service, f"127.0.0.1:{port}"
        finally:
            await server.stop(1.0)


async def test_hidden_states_cross_in_chunks_and_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving_hidden(monkeypatch) as (_, address), GrpcScoreClient(address) as client:
        request = make_request(3, num_response=50, wants_hidden_states=True)
        reply = await client.score(request)
        async with grpc.aio.insecure_channel(address) as channel:
            message = pb.ScoreStreamRequest(request=request_to_proto(request))
            parts = [part async for part in TeacherServiceStub(channel).ScoreStream(message)]
    assert reply.scores.hidden_states is not None
    np.testing.assert_array_equal(reply.scores.hidden_states, hidden_of(request))
    np.testing.assert_array_equal(reply.scores.sampled_logprobs, (request.response_token_ids / -10).astype(np.float32))
    # A row is 8 values and a log-prob: five in 200 bytes.
    assert [part.first_row for part in parts] == list(range(0, 50, 5))
    assert [part.is_last for part in parts] == [False] * 9 + [True]


async def test_a_long_reply_may_be_streamed_without_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving_hidden(monkeypatch) as (_, address), grpc.aio.insecure_channel(address) as channel:
        message = pb.ScoreStreamRequest(request=request_to_proto(make_request(3, num_response=500)))
        parts = [part async for part in TeacherServiceStub(channel).ScoreStream(message)]
    assert len(parts) == 10 and not parts[0].reply.scores.HasField("hidden_states")


async def test_one_message_never_holds_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving_hidden(monkeypatch) as (service, address), grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raw:
            await TeacherServiceStub(channel).Score(request_to_proto(make_request(3, wants_hidden_states=True)))
        assert dict(raw.value.trailing_metadata())["opd-code"] == "unsupported"
        assert "wants_hidden_states=true: hidden states travel in ScoreStream over gRPC alone" in raw.value.details()
        # The queue's way to the same handler.
        with pytest.raises(UnsupportedError, match="never through the queue"):
            await service.scoring.score(make_request(3, wants_hidden_states=True))
        assert service.engine.scored == []


async def test_a_teacher_that_does_not_serve_them_says_so(tmp_path: Path) -> None:
    async with serving() as (_, client):
        with pytest.raises(UnsupportedError, match="hidden_states: the fake engine of tiny does not supply it"):
            await client.score(make_request(3, wants_hidden_states=True))
        with pytest.raises(UnsupportedError, match=r"does not serve hidden states; set hidden_states\.enabled=true"):
            async for _ in client.output_head():
                pass
        with pytest.raises(UnsupportedError, match="teacher tiny does not serve hidden states"):
            await HeadCache(tmp_path).fetch(await client.info(), client.output_head)


async def test_the_head_arrives_as_a_file_that_others_can_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with (
        serving_hidden(monkeypatch) as (_, address),
        ScoreClient.connect(f"grpc://{address}", teacher="tiny", tenant="math") as client,
    ):
        file = await client.output_head(tmp_path)
        info = await client.info()
    assert file.path == tmp_path / f"{HEAD_HASH}.safetensors" and file.sha256 == info.output_head_hash
    assert (file.num_defined_ids, file.logit_scale, file.logit_softcap) == (90, 1.0, None)
    found = load_file(file.path)
    np.testing.assert_array_equal(found["weight"], WEIGHT)
    np.testing.assert_array_equal(found["bias"], BIAS)


class DenyingServicer(TeacherServicer):
    """Says no before anything is handled, as whoever judges rights does."""

    async def ScoreStream(self, request: Any, context: Any) -> None:
        await self._deny(context)

    async def GetOutputHead(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._deny(context)
        yield

    async def _deny(self, context: Any) -> None:
        error = PermissionDeniedError("tenant math: has no right to hidden states")
        await context.abort(STATUS[error.code], error.message, trailing_metadata(error))


async def test_a_refused_right_arrives_as_itself_and_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with (
        serving_hidden(monkeypatch, make_servicer=DenyingServicer) as (service, address),
        ScoreClient.connect(f"grpc://{address}", teacher="tiny", tenant="math") as client,
    ):
        with pytest.raises(PermissionDeniedError, match="has no right to hidden states"):
            await client.score(make_request(3, wants_hidden_states=True))
        with pytest.raises(PermissionDeniedError, match="has no right to hidden states"):
            await client.output_head(tmp_path)
        assert client.stats.resubmitted == 0 and service.engine.scored == []
        assert (await client.score(make_request(3))).rollout_id == "run.0.3"


async def test_another_teachers_head_and_a_place_beyond_its_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving_hidden(monkeypatch) as (_, address), grpc.aio.insecure_channel(address) as channel:
        stub = TeacherServiceStub(channel)
        for message, code in (
            (pb.GetOutputHeadRequest(teacher="big"), grpc.StatusCode.NOT_FOUND),
            (pb.GetOutputHeadRequest(offset_bytes=WEIGHT.nbytes + 1), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raw:
                async for _ in stub.GetOutputHead(message):
                    pass
            assert raw.value.code() is code
        async with GrpcScoreClient(address) as client:
            with pytest.raises(UnknownTeacherError):
                await client.score(make_request(3, teacher="big", wants_hidden_states=True))


async def test_a_caller_that_goes_away_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving_hidden(monkeypatch) as (service, address), grpc.aio.insecure_channel(address) as channel:
        message = request_to_proto(make_request(3, num_response=5000, wants_hidden_states=True))
        call = TeacherServiceStub(channel).ScoreStream(pb.ScoreStreamRequest(request=message))
        assert (await call.read()).first_row == 0
        call.cancel()
        async with GrpcScoreClient(address) as client:
            await client.score(make_request(4))
        await until(lambda: service.scoring.num_in_flight == 0)


async def test_what_is_being_read_counts_against_the_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        serving_hidden(monkeypatch) as (service, address),
        grpc.aio.insecure_channel(address) as channel,
        GrpcScoreClient(address) as client,
    ):
        long = make_request(3, num_response=50_000, wants_hidden_states=True)
        other = make_request(4, num_response=20_000)
        call = TeacherServiceStub(channel).ScoreStream(pb.ScoreStreamRequest(request=request_to_proto(long)))
        # More than the connection takes at once, so the rest waits for its reader.
        assert (await call.read()).first_row == 0
        with pytest.raises(OverCapacityError, match=f"tenant math already hold {long.num_tokens} of 65536"):
            await client.score(other)
        call.cancel()
        await until(lambda: service.scoring.num_in_flight == 0)
        assert (await client.score(other)).rollout_id == "run.0.4"
        await client.score(long)
        await until(lambda: service.scoring.num_in_flight == 0)


class CuttingServicer(TeacherServicer):
    """Every answer ends after three messages while there are cuts left, in an error or in silence."""

    def __init__(self, *args: Any, num_cuts: int, in_silence: bool = False, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.num_cuts = num_cuts
        self.in_silence = in_silence
        self.offsets: list[int] = []

    async def ScoreStream(self, request: Any, context: Any) -> None:
        with suppress(Silence):
            await super().ScoreStream(request, CutContext(self, context))

    async def GetOutputHead(self, request: Any, context: Any) -> None:
        self.offsets.append(request.offset_bytes)
        cut = CutContext(self, context)
        async for message in super().GetOutputHead(request, context):
            await cut.write(message)


class Silence(Exception):
    """Ends a stream as if it were whole."""


class CutContext:
    """A call's context that lets three messages through."""

    def __init__(self, servicer: CuttingServicer, context: Any) -> None:
        self._servicer, self._context = servicer, context
        self._num_written = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        if self._servicer.num_cuts > 0 and self._num_written == 3:
            self._servicer.num_cuts -= 1
            if self._servicer.in_silence:
                raise Silence
            await self._context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        self._num_written += 1
        await self._context.write(message)


@pytest.mark.parametrize("in_silence", [False, True])
async def test_a_stream_that_is_cut_is_asked_for_again_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, in_silence: bool
) -> None:
    make = partial(CuttingServicer, num_cuts=2, in_silence=in_silence)
    async with (
        serving_hidden(monkeypatch, make_servicer=make) as (service, address),
        ScoreClient.connect(f"grpc://{address}", teacher="tiny", tenant="math") as client,
    ):
        request = make_request(3, num_response=50, wants_hidden_states=True)
        reply = await client.score(request)
        np.testing.assert_array_equal(reply.scores.hidden_states, hidden_of(request))
        assert (client.stats.resubmitted, client.stats.scored, client.stats.failed) == (2, 1, 0)
        assert len(service.engine.scored) == 3


async def test_when_the_patience_is_over_the_error_says_what_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(CuttingServicer, num_cuts=10**6, in_silence=True)
    async with (
        serving_hidden(monkeypatch, make_servicer=make) as (_, address),
        ScoreClient.connect(f"grpc://{address}", teacher="tiny", tenant="math", patience_s=0.3) as client,
    ):
        with pytest.raises(TeacherUnavailableError, match=r"run\.0\.3: the stream ended after 15 of 50 rows"):
            await client.score(make_request(3, num_response=50, wants_hidden_states=True))
        assert client.stats.failed == 1


async def test_a_head_that_is_cut_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[CuttingServicer] = []

    def make(*args: Any, **settings: Any) -> TeacherServicer:
        made.append(CuttingServicer(*args, num_cuts=2, **settings))
        return made[-1]

    async with (
        serving_hidden(monkeypatch, make_servicer=make) as (_, address),
        ScoreClient.connect(f"grpc://{address}", teacher="tiny", tenant="math") as client,
    ):
        file = await client.output_head(tmp_path)
    assert made[0].offsets == [0, 600, 1200]
    np.testing.assert_array_equal(load_file(file.path)["weight"], WEIGHT)
