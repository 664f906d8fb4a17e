"""The HTTP shell: health, metrics, the handshake, and scoring for looking by hand.

/v1/score speaks JSON for people with curl; programs use the queue or gRPC. Values that were not computed are null.
Errors have the same form everywhere: {"error": {code, message, retryable, retry_after_s}}.
"""

import math
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict

from opd.credentials import read_pem
from opd.errors import ConfigError, InvalidRequestError
from opd.metrics import CONTENT_TYPE, TeacherMetrics
from opd.types import ScoreReply, ScoreRequest
from services.http_docs import documented_app
from services.teacher_server.config import HttpSettings
from services.teacher_server.gate import Gate
from services.teacher_server.http_gate import HttpGate, stand_before
from services.teacher_server.readiness import Part, Readiness
from services.teacher_server.scoring import ScoringSlot
from services.teacher_server.serving import current

_BY_HAND = "by-hand"


class ScoreBody(BaseModel):
    """The JSON form of a `ScoreRequest`."""

    model_config = ConfigDict(extra="forbid")

    prompt_token_ids: list[int]
    response_token_ids: list[int]
    rollout_id: str = _BY_HAND
    tenant: str = ""
    """Empty: the one whose token it is, or `by-hand` where nobody is told apart."""
    teacher: str = ""
    """Empty: whoever answers here."""
    candidate_token_ids: list[list[int]] | None = None
    score_top_k: int = 0
    wants_sampled: bool = True
    wants_entropy: bool = False
    teacher_temperature: float = 1.0
    timeout_ms: int = 60_000

    def to_request(self, teacher: str, tenant: str) -> ScoreRequest:
        """Raises InvalidRequestError for ids that are no 32-bit integers and ragged candidates."""
        fields = self.model_dump()
        for name in ("prompt_token_ids", "response_token_ids", "candidate_token_ids"):
            fields[name] = _ids(name, fields[name])
        return ScoreRequest(**(fields | {"teacher": self.teacher or teacher, "tenant": self.tenant or tenant}))


def create_app(
    slot: ScoringSlot,
    readiness: Readiness,
    metrics: TeacherMetrics,
    settings: HttpSettings,
    gate: Gate | None = None,
) -> FastAPI:
    """All routes; needs no running engine."""
    app = documented_app("OPD teacher", "One replica: health, metrics, its handshake, and scoring by hand.")
    with_token = [Security(HTTPBearer(auto_error=False, description="The tenant's token."))]
    doors = HttpGate(gate or Gate(), settings)

    stand_before(app, doors, metrics)

    @app.get("/healthz")
    async def healthz() -> Response:
        """503 when a forward pass stands still."""
        # A standing engine does not come back by itself: this is what asks for a restart.
        stalled = readiness.reasons.get(Part.ENGINE)
        return JSONResponse({"status": stalled or "ok"}, 503 if stalled else 200)

    @app.get("/readyz")
    async def readyz() -> Response:
        """200 when requests are taken, with the reason when not."""
        return JSONResponse({"status": readiness.describe()}, 200 if readiness.is_ready else 503)

    @app.get("/metrics")
    async def render() -> Response:
        """Prometheus's text format."""
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    @app.get("/v1/info", dependencies=with_token)
    async def info() -> Response:
        """The handshake: who this teacher is, what it does exactly, how much it takes."""
        found = asdict(slot.get().info())
        return JSONResponse(found | {"capabilities": sorted(found["capabilities"])})

    @app.post("/v1/score", dependencies=with_token)
    async def score(body: ScoreBody, http_request: Request) -> Response:
        """Log-probs of one response; programs use the queue or gRPC."""
        scoring, tenant, served = slot.get(), http_request.state.tenant, current()
        served.about(rollout_id=body.rollout_id, tenant=tenant or body.tenant or _BY_HAND)
        request = body.to_request(scoring.info().teacher, tenant or _BY_HAND)
        doors.gate.check_request(tenant, request.tenant)
        reply = await scoring.score(served.opened(request))
        with served.span.child("reply"):
            response = JSONResponse(reply_as_json(reply))
        served.scored(reply)
        return response

    return app


class HttpServer:
    """The listener: bound at once, so that a taken port is told before anything heavy starts."""

    def __init__(self, app: FastAPI, settings: HttpSettings) -> None:
        self._settings = settings
        self._server = _QuietServer(
            uvicorn.Config(
                app, log_config=None, access_log=False, log_level="warning", lifespan="off", ws="none", **_tls(settings)
            )
        )
        self._socket: socket.socket | None = None

    def bind(self) -> int:
        """The port; raises ConfigError when it is taken."""
        settings = self._settings
        try:
            self._socket = socket.create_server((settings.host, settings.port), reuse_port=False)
        except OSError as error:
            raise ConfigError(
                f"http.port={settings.port}: cannot listen on {settings.host} ({error.strerror or error}); choose "
                "another, or 0 for a free one"
            ) from None
        return int(self._socket.getsockname()[1])

    async def run(self) -> None:
        """Serves until `stop`."""
        assert self._socket is not None, "bind comes before run"
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Lets `run` finish its last answers and return."""
        self._server.should_exit = True
        if self._socket is not None and not self._server.started:
            self._socket.close()


def _tls(settings: HttpSettings) -> dict[str, Any]:
    """uvicorn's own options; raises ConfigError for files that are none."""
    tls = settings.tls
    if tls.cert_file is None or tls.key_file is None:
        return {}
    files = {"ssl_certfile": tls.cert_file, "ssl_keyfile": tls.key_file, "ssl_ca_certs": tls.client_ca_file}
    found = {name: str(path.expanduser()) for name, path in files.items() if path is not None}
    for name in found:
        read_pem(f"http.tls.{name}", Path(found[name]))
    return found | ({"ssl_cert_reqs": ssl.CERT_REQUIRED} if tls.client_ca_file else {})


class _QuietServer(uvicorn.Server):
    """Leaves signals to the one owner this process has."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def reply_as_json(reply: ScoreReply) -> dict[str, Any]:
    """Plain lists, null where a value was not computed."""
    fields = asdict(reply)
    fields["scores"] = {name: _plain(values) for name, values in fields["scores"].items() if values is not None}
    return fields


def _plain(values: Any) -> Any:
    if isinstance(values, np.ndarray):
        return [_plain(value) for value in values.tolist()]
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _ids(name: str, values: list[Any] | None) -> Any:
    if values is None:
        return None
    try:
        return (
            np.array(values, np.int32).reshape(len(values), -1)
            if name.startswith("cand")
            else np.array(values, np.int32)
        )
    except (ValueError, OverflowError):
        raise InvalidRequestError(f"{name}: is no rectangle of 32-bit ids; pad rows with -1") from None
