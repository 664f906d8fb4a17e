"""A teacher pool over gRPC: one call, one rollout, typed errors.

Round robin over every address the name resolves to, so that a headless service spreads the load. The request's
time-out is the call's deadline. Nothing is retried here: whoever retries sees `retryable` and `retry_after_s`.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self

import grpc

from opd.credentials import Credentials, read_pem
from opd.errors import ConfigError, OpdError, TeacherUnavailableError
from opd.rpc.scheme import wrong_scheme
from opd.rpc.status import error_from_rpc
from opd.types import ScoreReply, ScoreRequest, TeacherInfo
from opd.wire.chunks import ReplyAssembly
from opd.wire.heads import HeadPart, head_part
from opd.wire.messages import check_message_size, info_from_proto, reply_from_proto, request_to_proto
from opd.wire.pb import teacher_pb2 as pb
from opd.wire.pb.teacher_pb2_grpc import TeacherServiceStub

DEFAULT_MAX_MESSAGE_BYTES = 64 << 20
KEEPALIVE_TIME_S = 30.0
"""Servers must allow pings this often; ours does."""
_INFO_TIMEOUT_S = 20.0
_HEAD_IDLE_S = 30.0
"""A download has no time limit of its own, only its pauses have."""
_SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})


class GrpcScoreClient:
    """One channel to one pool; for one event loop.

    Example::

        async with GrpcScoreClient("teachers.internal:7000") as client:
            print((await client.info()).fingerprint)
            reply = await client.score(request)
    """

    def __init__(
        self,
        target: str,
        *,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        credentials: Credentials | None = None,
    ) -> None:
        """`grpcs://` goes over TLS; raises ConfigError where a token would travel in clear text."""
        self._is_encrypted = target.startswith("grpcs://")
        self._credentials = credentials or Credentials()
        self._target = target.removeprefix("grpc://").removeprefix("grpcs://").rstrip("/")
        if not self._target or ("://" in self._target and ":///" not in self._target):
            raise ConfigError(f"target={target!r}: is no gRPC address; give grpc://host:port or grpcs://host:port")
        self._credentials.check_way("url", _host(self._target), is_encrypted=self._is_encrypted)
        token = self._credentials.token
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._max_message_bytes = max_message_bytes
        self._knows_limit = False
        self._first_info = asyncio.Lock()
        self._channel: Any = None
        self._stub: Any = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def info(self) -> TeacherInfo:
        """The handshake of whichever replica answers; its message limit is kept to from then on."""
        response = await self._call("GetInfo", pb.GetInfoRequest(), _INFO_TIMEOUT_S)
        info = info_from_proto(response)
        self._knows_limit = True
        if info.max_message_bytes:
            self._max_message_bytes = min(self._max_message_bytes, info.max_message_bytes)
        return info

    async def score(self, request: ScoreRequest) -> ScoreReply:
        """Raises the typed error of the server, or of the way there; hidden states come in a stream."""
        await self._learn_limit()
        message = request_to_proto(request)
        check_message_size(request.rollout_id, message.ByteSize(), self._max_message_bytes)
        if request.wants_hidden_states:
            return await self._score_stream(request, message)
        response = await self._call("Score", message, request.timeout_ms / 1000)
        return reply_from_proto(response.reply, request.candidate_token_ids)

    async def output_head(self, offset_bytes: int = 0) -> AsyncGenerator[HeadPart, None]:
        """The output head from a byte of its weight on; for `opd.head_cache`, which keeps it whole on disk."""
        call = self._connected().GetOutputHead(
            pb.GetOutputHeadRequest(offset_bytes=offset_bytes), metadata=self._metadata
        )
        try:
            while True:
                async with asyncio.timeout(_HEAD_IDLE_S):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    return
                yield head_part(message)
        except grpc.aio.AioRpcError as error:
            raise await self._explain(error) from None
        except TimeoutError:
            raise TeacherUnavailableError(f"teacher at {self._target}: no byte for {_HEAD_IDLE_S:.0f} s") from None
        finally:
            call.cancel()

    async def close(self) -> None:
        """Ends the channel; calls under way are cancelled."""
        channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            await channel.close()

    async def _learn_limit(self) -> None:
        """Asks once, whoever comes first; a message over the limit is then never sent."""
        if self._knows_limit:
            return
        async with self._first_info:
            if not self._knows_limit:
                await self.info()

    async def _call(self, method: str, message: Any, timeout_s: float) -> Any:
        try:
            call = getattr(self._connected(), method)
            return await call(message, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise await self._explain(error) from None

    async def _score_stream(self, request: ScoreRequest, message: pb.ScoreRequest) -> ScoreReply:
        assembly = ReplyAssembly(request)
        call = self._connected().ScoreStream(
            pb.ScoreStreamRequest(request=message), timeout=request.timeout_ms / 1000, metadata=self._metadata
        )
        try:
            async for part in call:
                assembly.add(part)
        except grpc.aio.AioRpcError as error:
            raise await self._explain(error) from None
        finally:
            # Whoever gives up, for whatever reason, frees the server too.
            call.cancel()
        return assembly.finish()

    async def _explain(self, error: Any) -> OpdError:
        """A teacher that answered once is not asked how it wants to be spoken to."""
        if not self._knows_limit and error.code() is grpc.StatusCode.UNAVAILABLE:
            found = await wrong_scheme(self._target, error.details() or "", is_encrypted=self._is_encrypted)
            if found is not None:
                return found
        return error_from_rpc(error, self._target)

    def _connected(self) -> Any:
        if self._stub is None:
            self._connect()
        return self._stub

    def _connect(self) -> None:
        address = self._target if ":///" in self._target else f"dns:///{self._target}"
        options = [
            ("grpc.service_config", _SERVICE_CONFIG),
            ("grpc.enable_retries", 0),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", self._max_message_bytes),
            ("grpc.keepalive_time_ms", int(1000 * KEEPALIVE_TIME_S)),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if self._is_encrypted:
            self._channel = grpc.aio.secure_channel(address, _channel_credentials(self._credentials), options=options)
        else:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        self._stub = TeacherServiceStub(self._channel)  # type: ignore[no-untyped-call]


def _host(target: str) -> str:
    """The host of host:port; a Unix socket is this machine."""
    if target.startswith("unix:"):
        return "localhost"
    address = target.rpartition("/")[2]
    return address.rpartition("]")[0] if address.startswith("[") else address.partition(":")[0]


def _channel_credentials(credentials: Credentials) -> Any:
    found = {
        name: None if path is None else read_pem(name, path)
        for name, path in (
            ("ca_file", credentials.ca_file),
            ("key_file", credentials.key_file),
            ("cert_file", credentials.cert_file),
        )
    }
    return grpc.ssl_channel_credentials(found["ca_file"], found["key_file"], found["cert_file"])
