"""The gate before the gRPC servicer: tokens are judged before a message is decoded, rights before it is handled.

Health and reflection pass. A message that is none is a typed refusal: gRPC's own decoder would end such a call with
an unexplained status and a traceback in the log.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from opd.errors import InvalidRequestError, OpdError
from opd.rpc.status import STATUS, trailing_metadata
from opd.wire.pb import teacher_pb2 as pb
from services.teacher_server.gate import Gate

SERVICE = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
_OUTPUT_HEAD = f"/{SERVICE}/GetOutputHead"


class GateInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every method of the teacher's service."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(f"/{SERVICE}/"):
            return handler
        headers = [value for key, value in details.invocation_metadata if key == "authorization"]
        try:
            tenant = self._gate.authenticate(_text(headers[0]) if headers else None)
        except OpdError as error:
            return _refusing(handler, error)
        return self._guarded(handler, details.method, tenant)

    def _guarded(self, handler: Any, method: str, tenant: str | None) -> Any:
        """The same method over raw bytes: decoded and judged here, then handed on."""

        def open_message(body: bytes) -> Any:
            message = _decode(handler.request_deserializer, body)
            self._judge(message, method, tenant)
            return message

        async def call(body: bytes, context: Any) -> Any:
            try:
                message = open_message(body)
            except OpdError as error:
                await _refuse(context, error)
            return await handler.unary_unary(message, context)

        async def stream(body: bytes, context: Any) -> AsyncIterator[Any]:
            try:
                message = open_message(body)
            except OpdError as error:
                await _refuse(context, error)
            answers = handler.unary_stream(message, context)
            if hasattr(answers, "__aiter__"):
                async for answer in answers:
                    yield answer
            else:
                await answers

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(call, None, handler.response_serializer)

    def _judge(self, message: Any, method: str, tenant: str | None) -> None:
        request = message.request if isinstance(message, pb.ScoreStreamRequest) else message
        if isinstance(request, pb.ScoreRequest):
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


def _refusing(handler: Any, error: OpdError) -> Any:
    async def call(_: bytes, context: Any) -> None:
        await _refuse(context, error)

    async def stream(_: bytes, context: Any) -> AsyncIterator[Any]:
        await _refuse(context, error)
        yield

    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(stream)
    return grpc.unary_unary_rpc_method_handler(call)


async def _refuse(context: Any, error: OpdError) -> NoReturn:
    await context.abort(STATUS[error.code], error.message, trailing_metadata(error))
    raise AssertionError("abort raises")


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
