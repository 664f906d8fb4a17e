"""Errors over gRPC: one table to status codes, and trailing metadata that carry the error's own code and delay.

The status is for tools that know nothing of us; `opd-code` rebuilds the very class on the other side. Errors that gRPC
itself raises (nobody listens, a message over the limit, a deadline) have no such metadata and are told apart here.
"""

import math
from typing import Any

import grpc

from opd.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    OpdError,
    OverCapacityError,
    PermissionDeniedError,
    TeacherUnavailableError,
    UnauthenticatedError,
    UnsupportedError,
    from_code,
)

CODE_KEY = "opd-code"
RETRY_AFTER_KEY = "opd-retry-after-ms"

STATUS: dict[str, grpc.StatusCode] = {
    "internal": grpc.StatusCode.INTERNAL,
    "config": grpc.StatusCode.FAILED_PRECONDITION,
    "invalid_request": grpc.StatusCode.INVALID_ARGUMENT,
    "unsupported": grpc.StatusCode.UNIMPLEMENTED,
    "vocabulary_mismatch": grpc.StatusCode.FAILED_PRECONDITION,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "permission_denied": grpc.StatusCode.PERMISSION_DENIED,
    "unknown_teacher": grpc.StatusCode.NOT_FOUND,
    "over_capacity": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "deadline_exceeded": grpc.StatusCode.DEADLINE_EXCEEDED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "lost_request": grpc.StatusCode.ABORTED,
    "dead_letter": grpc.StatusCode.DATA_LOSS,
    "non_finite": grpc.StatusCode.OUT_OF_RANGE,
    "queue_unavailable": grpc.StatusCode.UNAVAILABLE,
    "queue_misconfigured": grpc.StatusCode.FAILED_PRECONDITION,
    "checkpoint": grpc.StatusCode.INTERNAL,
    "rank_lost": grpc.StatusCode.UNAVAILABLE,
    "rollout_engine": grpc.StatusCode.INTERNAL,
}
"""Every code of the error tree."""

# What a status without our metadata means, where it is not told by the details.
_PLAIN: dict[grpc.StatusCode, type[OpdError]] = {
    grpc.StatusCode.UNAVAILABLE: TeacherUnavailableError,
    grpc.StatusCode.CANCELLED: TeacherUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverCapacityError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
}
_TOO_LARGE = "larger than max"
_PLAIN_RETRY_S = 1.0


def trailing_metadata(error: OpdError) -> tuple[tuple[str, str], ...]:
    """What travels beside status and message."""
    found = [(CODE_KEY, error.code)]
    if error.retry_after_s is not None:
        found.append((RETRY_AFTER_KEY, str(math.ceil(1000 * error.retry_after_s))))
    return tuple(found)


def error_from_rpc(error: Any, target: str) -> OpdError:
    """The OpdError behind a `grpc.aio.AioRpcError`."""
    metadata = {str(key): str(value) for key, value in (error.trailing_metadata() or ())}
    details = error.details() or ""
    if CODE_KEY in metadata:
        delay_ms = metadata.get(RETRY_AFTER_KEY, "")
        return from_code(metadata[CODE_KEY], details, int(delay_ms) / 1000 if delay_ms.isdigit() else None)
    status = error.code()
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in details:
        return InvalidRequestError(f"message: {details}; send less, or raise grpc.max_message_bytes on both sides")
    cls = _PLAIN.get(status, InternalError)
    delay_s = _PLAIN_RETRY_S if cls.retryable else None
    return cls(f"teacher at {target}: {status.name.lower()} ({details})", retry_after_s=delay_s)
