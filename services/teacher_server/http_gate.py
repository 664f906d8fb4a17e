"""What stands before every HTTP route: tokens, bounds on bodies, and one form for every error.

Judged from the headers alone, before a byte of the body is read. /healthz and /readyz are open: probes have no token
and learn nothing else. So are the pages that explain the routes. /metrics names tenants, so it is open only where
nobody else listens or nobody is told apart.
"""

import hmac
import math
from collections.abc import Awaitable, Callable
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from opd.credentials import is_loopback
from opd.errors import InvalidRequestError, OpdError, PermissionDeniedError, UnauthenticatedError
from opd.metrics import TeacherMetrics
from opd.settings import read_secret_file
from opd.tracing import checked_traceparent
from services.http_docs import is_documentation
from services.teacher_server.config import HttpSettings
from services.teacher_server.gate import Gate
from services.teacher_server.serving import current, serving

_OPEN_PATHS = frozenset({"/healthz", "/readyz"})
STATUS: dict[str, int] = {
    "invalid_request": 400,
    "unauthenticated": 401,
    "permission_denied": 403,
    "unknown_teacher": 404,
    "vocabulary_mismatch": 409,
    "over_capacity": 429,
    "non_finite": 422,
    "unsupported": 501,
    "unavailable": 503,
    "queue_unavailable": 503,
    "deadline_exceeded": 504,
}
"""Codes of the error tree that a score can end with; every other one is a 500."""


class HttpGate:
    """Judges a request by its headers; notes its tenant and trace context in `request.state`."""

    def __init__(self, gate: Gate, settings: HttpSettings) -> None:
        self.gate = gate
        self._max_body_bytes = settings.max_body_bytes
        self._are_metrics_open = gate.is_open or is_loopback(settings.host)
        file = settings.metrics_token_file
        self._metrics_token = None if file is None else read_secret_file("http.metrics_token_file", file)

    def enter(self, request: Request) -> None:
        """Raises UnauthenticatedError, PermissionDeniedError or InvalidRequestError."""
        # What routing goes by; the URL is put together from headers, which the caller chooses.
        path, authorization = request.scope["path"], request.headers.get("authorization")
        request.state.tenant, request.state.traceparent = None, ""
        if path == "/metrics":
            self._enter_metrics(authorization)
        elif path not in _OPEN_PATHS and not is_documentation(path):
            request.state.tenant = self.gate.authenticate(authorization)
            # Not on the open paths: spans are for who was let in.
            request.state.traceparent = checked_traceparent(request.headers.get("traceparent", ""))
        if request.method not in ("GET", "HEAD"):
            self._check_body(request)

    def _enter_metrics(self, authorization: str | None) -> None:
        if self._metrics_token is not None:
            given = (authorization or "").encode()
            if not hmac.compare_digest(given, f"Bearer {self._metrics_token}".encode()):
                raise UnauthenticatedError("authorization: is not the token of http.metrics_token_file; send that one")
        elif not self._are_metrics_open:
            raise PermissionDeniedError("/metrics: shut off loopback; set http.metrics_token_file and send its token")

    def _check_body(self, request: Request) -> None:
        length = request.headers.get("content-length", "")
        # With chunks the body has no length, whatever the other header says.
        if "transfer-encoding" in request.headers:
            length = ""
        if not (length.isascii() and length.isdigit() and len(length) < 20 and int(length) <= self._max_body_bytes):
            raise InvalidRequestError(
                f"content-length={length[:20] or 'absent'}: a body of at most {self._max_body_bytes} bytes is read; "
                "use gRPC for more"
            )


def stand_before(app: FastAPI, doors: HttpGate, metrics: TeacherMetrics) -> None:
    """Has every request watched and judged before its route, and every error told in one form."""

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        with serving(metrics, f"{request.method} {quote(request.scope['path'][:80])}") as served:
            try:
                doors.enter(request)
                served.about(tenant=request.state.tenant or "", traceparent=request.state.traceparent)
                return await call_next(request)
            except OpdError as error:
                return _refusal(error)
            except Exception:
                return _refusal(served.failed())

    _tell_errors(app)


def _tell_errors(app: FastAPI) -> None:
    """Of the routes, which are all behind the guard."""

    @app.exception_handler(OpdError)
    async def tell(_: Request, error: OpdError) -> Response:
        return _refusal(error)

    @app.exception_handler(RequestValidationError)
    async def tell_form(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part)[:80] for part in first["loc"][1:]) or "body"
        return _refusal(InvalidRequestError(f"{where}: {first['msg'].lower()}"))

    @app.exception_handler(HTTPException)
    async def tell_status(request: Request, error: HTTPException) -> Response:
        # Of the framework's own: no such path, another method, a body that cannot be parsed.
        found = InvalidRequestError(f"{request.method} {request.url.path[:80]}: {str(error.detail).lower()}")
        return _refusal(found, error.status_code)


def _refusal(error: OpdError, status: int | None = None) -> Response:
    """{"error": {code, message, retryable, retry_after_s}} with the code's status.

    The answer to the request that is being served, which is counted and told thereby.
    """
    current().refused(error)
    content = {
        "code": error.code,
        # A body may hold what no text can, such as half a surrogate pair, and the message may quote it.
        "message": error.message.encode("utf-8", "backslashreplace").decode(),
        "retryable": error.retryable,
        "retry_after_s": error.retry_after_s,
    }
    headers = {"Retry-After": str(math.ceil(error.retry_after_s))} if error.retry_after_s is not None else {}
    if error.code == "unauthenticated":
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": content}, status or STATUS.get(error.code, 500), headers=headers)
