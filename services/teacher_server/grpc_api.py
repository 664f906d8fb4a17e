"""The gRPC shell: decode, call TeacherScoring, encode; health and reflection beside it.

Nothing here decides anything about a request. What a method raises becomes its answer in `grpc_gate`.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from opd.credentials import read_pem
from opd.errors import ConfigError, DeadlineExceededError, UnknownTeacherError
from opd.metrics import TeacherMetrics
from opd.rpc.client import KEEPALIVE_TIME_S
from opd.types import ScoreReply, ScoreRequest
from opd.wire.chunks import split_reply
from opd.wire.heads import head_messages
from opd.wire.messages import check_message_size, info_to_proto, reply_to_proto, request_from_proto
from opd.wire.pb import teacher_pb2 as pb
from opd.wire.pb import teacher_pb2_grpc as pb_grpc
from services.teacher_server.config import GrpcSettings, TlsSettings
from services.teacher_server.gate import Gate
from services.teacher_server.grpc_gate import SERVICE, GateInterceptor
from services.teacher_server.readiness import Readiness
from services.teacher_server.scoring import ScoringSlot, TeacherScoring
from services.teacher_server.serving import current

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_CHUNK_BYTES = 1 << 20
_ROOM_FOR_PROBES = 100
"""Calls of health and reflection beside those of the service, which has a limit of its own."""


class TeacherServicer(pb_grpc.TeacherServiceServicer):
    """One method per RPC."""

    def __init__(self, slot: ScoringSlot, *, chunk_bytes: int = _CHUNK_BYTES) -> None:
        self._slot = slot
        self._chunk_bytes = chunk_bytes

    async def GetInfo(self, request: pb.GetInfoRequest, context: Any) -> pb.GetInfoResponse:
        return info_to_proto(self._scoring_of(request.teacher).info())

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        scoring, served = self._slot.get(), current()
        asked = served.opened(request_from_proto(request, scoring.info()))
        reply = await scoring.score(asked, patience_s=context.time_remaining())
        with served.span.child("reply"):
            response = pb.ScoreResponse(reply=reply_to_proto(reply, asked.encoding, asked.candidate_token_ids))
            check_message_size(asked.rollout_id, response.ByteSize(), scoring.info().max_message_bytes)
        served.scored(reply)
        return response

    async def ScoreStream(self, request: pb.ScoreStreamRequest, context: Any) -> None:
        scoring, served = self._slot.get(), current()
        asked = served.opened(request_from_proto(request.request, scoring.info()))
        reply, release = await scoring.score_streamed(asked, patience_s=context.time_remaining())
        try:
            with served.span.child("reply"):
                await self._write(reply, asked, context)
        finally:
            release()
        served.scored(reply)

    async def _write(self, reply: ScoreReply, asked: ScoreRequest, context: Any) -> None:
        """In chunks; raises DeadlineExceededError for a reader who takes too long and holds the whole reply here."""
        try:
            async with asyncio.timeout(asked.timeout_ms / 1000):
                for message in split_reply(reply, asked.encoding, self._chunk_bytes):
                    await context.write(message)
        except TimeoutError:
            raise DeadlineExceededError(
                f"timeout_ms={asked.timeout_ms}: the reply was not read in time; read it faster or ask for more time"
            ) from None

    async def GetOutputHead(
        self, request: pb.GetOutputHeadRequest, context: Any
    ) -> AsyncIterator[pb.GetOutputHeadResponse]:
        head = self._scoring_of(request.teacher).output_head()
        for message in head_messages(head, request.offset_bytes, self._chunk_bytes):
            yield message

    def _scoring_of(self, teacher: str) -> TeacherScoring:
        scoring = self._slot.get()
        info = scoring.info()
        if teacher not in ("", info.teacher, f"{info.teacher}@{info.fingerprint}"):
            raise UnknownTeacherError(f"teacher={teacher[:80]!r}: this replica serves {info.teacher!r}")
        return scoring


class GrpcServer:
    """The listener; answers health from the start, and requests once the slot is filled."""

    def __init__(
        self,
        settings: GrpcSettings,
        slot: ScoringSlot,
        readiness: Readiness,
        gate: Gate | None = None,
        *,
        metrics: TeacherMetrics,
        chunk_bytes: int = _CHUNK_BYTES,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._gate = gate or Gate()
        self._servicer = TeacherServicer(slot, chunk_bytes=chunk_bytes)
        self._readiness = readiness
        self._health = health.aio.HealthServicer()
        self._updates: set[asyncio.Task[None]] = set()
        self._server: Any = None

    async def start(self) -> int:
        """Listens and serves; returns the port, raises ConfigError when it is taken."""
        settings = self._settings
        self._server = grpc.aio.server(
            interceptors=(GateInterceptor(self._gate, self._metrics, max_calls=settings.max_concurrent_rpcs),),
            options=_options(settings),
            maximum_concurrent_rpcs=settings.max_concurrent_rpcs + _ROOM_FOR_PROBES,
        )
        pb_grpc.add_TeacherServiceServicer_to_server(self._servicer, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        port = self._bind()
        await self._server.start()
        self._readiness.subscribe(self._show)
        return port

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls and gives the ones under way `grace_s`."""
        if self._server is None:
            return
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    def _bind(self) -> int:
        host, port = self._settings.host, self._settings.port
        credentials = server_credentials(self._settings.tls)
        try:
            # Tried by ourselves first: gRPC would write its own lines beside ours.
            socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            if credentials is None:
                return int(self._server.add_insecure_port(address))
            return int(self._server.add_secure_port(address, credentials))
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"grpc.port={port}: cannot listen on {host} ({getattr(error, 'strerror', None) or error}); choose "
                "another, or 0 for a free one"
            ) from None

    def _show(self, is_ready: bool) -> None:
        task = asyncio.get_running_loop().create_task(self._set_health(_SERVING if is_ready else _NOT_SERVING))
        self._updates.add(task)
        task.add_done_callback(self._updates.discard)

    async def _set_health(self, status: Any) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)


def server_credentials(tls: TlsSettings) -> Any:
    """gRPC's own form of the certificate, None without one; raises ConfigError for files that are none."""
    if tls.cert_file is None or tls.key_file is None:
        return None
    pair = (read_pem("grpc.tls.key_file", tls.key_file), read_pem("grpc.tls.cert_file", tls.cert_file))
    client_ca = None if tls.client_ca_file is None else read_pem("grpc.tls.client_ca_file", tls.client_ca_file)
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


def _options(settings: GrpcSettings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.keepalive_time_ms", int(1000 * settings.keepalive_time_s)),
        ("grpc.keepalive_timeout_ms", int(1000 * settings.keepalive_timeout_s)),
        # Half of what our clients do, so that a punctual ping is never taken for abuse.
        ("grpc.http2.min_ping_interval_without_data_ms", int(500 * KEEPALIVE_TIME_S)),
        ("grpc.max_connection_age_ms", int(1000 * settings.max_connection_age_s)),
        ("grpc.max_connection_age_grace_ms", int(1000 * settings.max_connection_age_grace_s)),
        # Two processes on one port would silently share its connections.
        ("grpc.so_reuseport", 0),
    ]
