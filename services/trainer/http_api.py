"""What a running trainer tells over HTTP, on loopback unless told otherwise: alive, ready, metrics, state.

`RunStatus` is the one thing shared between the loop's thread and the server's: the loop writes, the server reads whole
snapshots. The server runs in a thread of its own, where uvicorn leaves signals alone: the run owns them.
"""

import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from opd.errors import ConfigError, InternalError
from services.http_docs import documented_app

_START_S = 10.0
_OF_TEACHER = "/teacher/"
READY_STATES = frozenset({"training", "evaluating"})


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusSnapshot:
    """The run at one moment."""

    state: str = "starting"
    """starting, waiting, training, evaluating, finished, stopped or failed."""
    step: int = 0
    """Completed steps."""
    num_steps: int = 0
    eta_s: float | None = None
    """At the mean pace so far; None before the first step."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the last step."""
    alarms: tuple[Mapping[str, Any], ...] = ()
    """Raised and not over: name, step, evidence, numbers, remedy and the paper's section."""


class RunStatus:
    """Written by the loop's thread, read by others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._snapshot = StatusSnapshot()
        self._begun: tuple[float, int] | None = None

    @property
    def snapshot(self) -> StatusSnapshot:
        with self._lock:
            return self._snapshot

    def enter(self, state: str) -> None:
        with self._lock:
            self._snapshot = replace(self._snapshot, state=state)

    def begin(self, step: int, num_steps: int) -> None:
        """Training starts, or goes on, after `step` completed steps."""
        with self._lock:
            self._begun = (time.monotonic(), step)
            self._snapshot = replace(self._snapshot, state="training", step=step, num_steps=num_steps)

    def finish_step(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._lock:
            eta_s = self._eta_s(step)
            self._snapshot = replace(self._snapshot, step=step, metrics=dict(metrics), eta_s=eta_s)

    def show_alarms(self, alarms: tuple[Mapping[str, Any], ...]) -> None:
        """Replaces the alarms that are shown."""
        with self._lock:
            self._snapshot = replace(self._snapshot, alarms=alarms)

    def _eta_s(self, step: int) -> float | None:
        if self._begun is None or step <= self._begun[1]:
            return None
        since, first_step = self._begun
        return (time.monotonic() - since) / (step - first_step) * (self._snapshot.num_steps - step)


class _StatusCollector(Collector):
    """Every metric of the last step as a gauge of its own."""

    def __init__(self, status: RunStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[GaugeMetricFamily]:
        snapshot = self._status.snapshot
        yield GaugeMetricFamily("opd_trainer_step", "Completed optimizer steps.", value=snapshot.step)
        yield GaugeMetricFamily("opd_trainer_steps_planned", "Steps of the whole run.", value=snapshot.num_steps)
        yield GaugeMetricFamily(
            "opd_trainer_ready", "1 while the loop is at work.", value=float(snapshot.state in READY_STATES)
        )
        alarms = GaugeMetricFamily("opd_trainer_alarm", "1 for each alarm that is not over.", labels=["name"])
        for alarm in snapshot.alarms:
            alarms.add_metric([alarm["name"]], 1.0)
        yield alarms
        by_teacher: dict[str, GaugeMetricFamily] = {}
        for name, value in sorted(snapshot.metrics.items()):
            key, _, teacher = name.partition(_OF_TEACHER)
            if not teacher:
                yield GaugeMetricFamily(prometheus_name(key), key, value=value)
                continue
            family = GaugeMetricFamily(f"{prometheus_name(key)}_by_teacher", key, labels=["teacher"])
            by_teacher.setdefault(key, family).add_metric([teacher], value)
        yield from by_teacher.values()


def prometheus_name(key: str) -> str:
    """What `/metrics` calls a metric of `metrics.jsonl`."""
    return f"opd_trainer_{re.sub(r'[^a-z0-9_]', '_', key.lower())}"


def build_app(status: RunStatus) -> FastAPI:
    """/healthz, /readyz, /metrics and /v1/run over one status."""
    app = documented_app("OPD trainer", "One run: health, metrics, and its state with remaining time and alarms.")
    registry = CollectorRegistry()
    registry.register(_StatusCollector(status))

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "alive"}

    @app.get("/readyz")
    def readyz(response: Response) -> dict[str, str]:
        """200 while the run trains or evaluates."""
        state = status.snapshot.state
        response.status_code = 200 if state in READY_STATES else 503
        return {"status": state}

    @app.get("/metrics")
    def metrics() -> Response:
        """Prometheus's text format, of the last step."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/run")
    def run() -> dict[str, Any]:
        """State, step, remaining time, the last step's metrics, alarms with their evidence."""
        return asdict(status.snapshot)

    return app


class StatusServer:
    """Serves a status until `close`."""

    def __init__(self, status: RunStatus, *, host: str, port: int) -> None:
        self._socket = _listen(host, port)
        self.port = int(self._socket.getsockname()[1])
        config = uvicorn.Config(build_app(status), log_level="warning", access_log=False, ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="status-http", daemon=True)

    def start(self) -> None:
        """Returns once requests are answered."""
        self._thread.start()
        deadline = time.monotonic() + _START_S
        while not self._server.started:
            if time.monotonic() > deadline or not self._thread.is_alive():
                raise InternalError(f"http: the status server did not start within {_START_S:.0f} s")
            time.sleep(0.01)

    def close(self) -> None:
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(timeout=_START_S)
        self._socket.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, port 0 being any free one; `ConfigError` when the address cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"http.port={port}: {host} cannot listen there ({error.strerror}); choose another, or 0 for any free one"
        ) from None
    return listener
