"""What stands before and around the gRPC servicer: every call is let in, watched and answered here.

Tokens are judged before a message is decoded, rights before it is handled. A message that is none is a typed refusal:
gRPC's own decoder would end such a call with an unexplained status and a traceback in the log. Whatever the servicer
raises becomes a status, the message and trailing metadata in this one place; a fault of ours is logged with its
traceback and told without it. Health and reflection pass.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from opd.errors import InvalidRequestError, OpdError, OverCapacityError
from opd.metrics import TeacherMetrics
from opd.rpc.status import STATUS, trailing_metadata
from opd.tracing import checked_traceparent
from opd.wire.pb import teacher_pb2 as pb
from services.teacher_server.gate import Gate
from services.teacher_server.serving import Serving, serving

SERVICE = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
_OUTPUT_HEAD = f"/{SERVICE}/GetOutputHead"
_RETRY_S = 1.0


class GateInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every method of the teacher's service; no more than `max_calls` are under way at once."""

    def __init__(self, gate: Gate, metrics: TeacherMetrics, *, max_calls: int) -> None:
        self._gate = gate
        self._metrics = metrics
        self._max_calls = max_calls
        self._num_calls = 0

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(f"/{SERVICE}/"):
            return handler
        headers = [value for key, value in details.invocation_metadata if key == "authorization"]
        return self._around(handler, details.method, _text(headers[0]) if headers else None)

    def _around(self, handler: Any, method: str, authorization: str | None) -> Any:
        """The same method over raw bytes: decoded and judged here, then handed on."""

        def open_message(body: bytes, served: Serving) -> Any:
            tenant = self._gate.authenticate(authorization)
            served.about(tenant=tenant or "")
            message = _decode(handler.request_deserializer, body)
            self._judge(message, method, tenant, served)
            return message

        async def call(body: bytes, context: Any) -> Any:
            async with self._answering(context, method) as served:
                return await handler.unary_unary(open_message(body, served), context)

        # Writes and does not yield: who generates may be ended in another task, which what is bound does not bear.
        async def stream(body: bytes, context: Any) -> None:
            async with self._answering(context, method) as served:
                answers = handler.unary_stream(open_message(body, served), context)
                if not hasattr(answers, "__aiter__"):
                    await answers
                    return
                async with aclosing(answers):
                    async for answer in answers:
                        await context.write(answer)

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(call, None, handler.response_serializer)

    @asynccontextmanager
    async def _answering(self, context: Any, method: str) -> AsyncIterator[Serving]:
        """The place where a call ends in a status, whoever raised what it ends with."""
        with serving(self._metrics, method.rpartition("/")[2]) as served:
            try:
                with self._counted():
                    yield served
            except OpdError as error:
                await _refuse(context, served, error)
            except grpc.aio.BaseError:
                # Of a call that is over: its caller is gone, or it was aborted.
                raise
            except Exception:
                await _refuse(context, served, served.failed())

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self._num_calls >= self._max_calls:
            raise OverCapacityError(
                f"grpc.max_concurrent_rpcs={self._max_calls}: so many calls are under way; come back later",
                retry_after_s=_RETRY_S,
            )
        self._num_calls += 1
        try:
            yield
        finally:
            self._num_calls -= 1

    def _judge(self, message: Any, method: str, tenant: str | None, served: Serving) -> None:
        request = message.request if isinstance(message, pb.ScoreStreamRequest) else message
        if isinstance(request, pb.ScoreRequest):
            served.about(
                rollout_id=request.rollout_id,
                tenant=tenant or request.tenant,
                traceparent=checked_traceparent(request.traceparent),
            )
            self._gate.check_request(tenant, request.tenant, wants_hidden_states=request.wants_hidden_states)
        elif method == _OUTPUT_HEAD:
            self._gate.check_hidden_states(tenant)


def _decode(deserialize: Callable[[bytes], Any], body: bytes) -> Any:
    try:
        return deserialize(body)
    except DecodeError:
        raise InvalidRequestError(
            f"body: {len(body)} bytes are no message of opd.v1 that this method takes; encode it with opd.wire"
        ) from None


async def _refuse(context: Any, served: Serving, error: OpdError) -> None:
    served.refused(error)
    await context.abort(STATUS[error.code], error.message, trailing_metadata(error))


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
