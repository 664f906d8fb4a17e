"""The pool's state over HTTP, and what an operator does to a pool; needs Redis alone, no engine and no replica.

An autoscaler reads `/metrics` or `/v1/pool` here while the pool is at zero, so this process stays up then. Requests of
its callers are answered from a snapshot that is at most `cache_s` old, however many there are.
"""

import asyncio
import contextlib
import dataclasses
import logging
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from pydantic import Field, field_validator

from opd.errors import ConfigError, OpdError
from opd.lifecycle import Shutdown
from opd.logs import configure_logging
from opd.metrics import CONTENT_TYPE
from opd.queue.connection import QueueConnection
from opd.queue.dead_letters import DeadLetter, list_dead, requeue_dead, show_dead
from opd.queue.keys import check_pool
from opd.queue.pools import promote_pool, resolve_pool
from opd.queue.status import OUTCOMES, PoolStatus, read_status
from opd.settings import Settings, load_settings
from opd.types import ScoreRequest
from opd.wire.messages import decode_request
from services.http_docs import documented_app
from services.teacher_server.queue_access import QueueAccess

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class PoolConfig(Settings):
    """The pool status service."""

    teachers: tuple[str, ...] = Field(min_length=1)
    """Names of the pools to watch, `name` or `name@fingerprint`; a bare name follows its alias."""
    redis_url: str | None = None
    """redis://, rediss:// or unix:// URL of the queue; unset takes OPD_REDIS_URL or its file."""
    trust_network: bool = False
    """The way to Redis is private: its password may travel without TLS."""
    host: str = "127.0.0.1"
    """Loopback unless told."""
    port: int = Field(default=8090, ge=0, le=65_535)
    """0 takes a free one, told in the log."""
    cache_s: float = Field(default=1.0, ge=0, le=60)
    """Age of a snapshot up to which it is served again."""
    patience_s: float = Field(default=3.0, gt=0)
    """How long an answer waits for a Redis that is away before it is 503."""
    log_level: str = "info"
    """Of everything on standard error."""
    log_json: bool = False
    """One JSON object a line."""

    @field_validator("teachers")
    @classmethod
    def _teachers_are_pools(cls, teachers: tuple[str, ...]) -> tuple[str, ...]:
        for teacher in teachers:
            try:
                check_pool(teacher)
            except OpdError as error:
                raise ValueError(error.message) from None
        return teachers


class PoolWatch:
    """Reads the pools' state, at most once in `cache_s`."""

    def __init__(self, connection: QueueConnection, teachers: Sequence[str], *, cache_s: float) -> None:
        self._connection = connection
        self._teachers = tuple(teachers)
        self._cache_s = cache_s
        self._lock = asyncio.Lock()
        self._read_at = float("-inf")
        self._states: dict[str, PoolStatus] = {}

    async def read(self) -> dict[str, PoolStatus]:
        """State by teacher; raises QueueUnavailableError rather than telling what was true once."""
        async with self._lock:
            if time.monotonic() - self._read_at > self._cache_s:
                self._states = {teacher: await self._read_one(teacher) for teacher in self._teachers}
                self._read_at = time.monotonic()
            return self._states

    async def check(self) -> None:
        """Raises when Redis does not answer."""
        await self._connection.call(lambda redis: redis.ping())

    async def _read_one(self, teacher: str) -> PoolStatus:
        return await read_status(self._connection, await resolve_pool(self._connection, teacher))


def build_app(watch: PoolWatch) -> FastAPI:
    """The three routes; an unreachable Redis is 503 with the error's one line."""
    app = documented_app("OPD pool status", "Pools of teachers as their queue shows them, also while none runs.")

    async def refuse(_request: object, error: Exception) -> JSONResponse:
        assert isinstance(error, OpdError)
        return JSONResponse({"code": error.code, "message": error.message}, status_code=503)

    app.add_exception_handler(OpdError, refuse)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """503 while Redis does not answer."""
        await watch.check()
        return {"status": "ok"}

    @app.get("/v1/pool")
    async def pool() -> dict[str, Any]:
        """Backlog, replicas and tenants by teacher."""
        states = await watch.read()
        return {"teachers": {teacher: dataclasses.asdict(state) for teacher, state in states.items()}}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus's text format: what an autoscaler reads."""
        return Response(render_metrics(await watch.read()), media_type=CONTENT_TYPE)

    return app


_TENANT_GAUGES = {
    "opd_pool_backlog_tokens": ("Tokens admitted and not yet answered.", "backlog_tokens"),
    "opd_pool_backlog_entries": ("Requests admitted and not yet answered.", "backlog_entries"),
    "opd_pool_leased_entries": ("Requests that a replica holds.", "leased_entries"),
    "opd_pool_oldest_age_seconds": ("Age of the oldest unanswered request.", "oldest_age_s"),
    "opd_pool_dead_letters": ("Requests put aside after several deliveries.", "dead_letters"),
}


def render_metrics(states: dict[str, PoolStatus]) -> bytes:
    """Prometheus text of one snapshot: gauges by tenant, and of each pool as a whole."""
    registry = CollectorRegistry()
    for name, (description, field) in _TENANT_GAUGES.items():
        gauge = Gauge(name, description, ["teacher", "tenant"], registry=registry)
        for teacher, state in states.items():
            for tenant in state.tenants:
                gauge.labels(teacher, tenant.tenant).set(getattr(tenant, field))
    replicas = Gauge("opd_pool_replicas", "Live replicas.", ["teacher"], registry=registry)
    total_tokens = Gauge("opd_pool_total_backlog_tokens", "Of all tenants.", ["teacher"], registry=registry)
    memory = Gauge("opd_pool_redis_memory_bytes", "Memory that Redis uses.", ["teacher"], registry=registry)
    memory_limit = Gauge(
        "opd_pool_redis_max_memory_bytes", "Redis's maxmemory; 0 means none.", ["teacher"], registry=registry
    )
    oldest = Gauge("opd_pool_total_oldest_age_seconds", "Of all tenants.", ["teacher"], registry=registry)
    tokens = Gauge(
        "opd_pool_scored_tokens", "Answered since the pool began; its rate is tokens/s.", ["teacher"], registry=registry
    )
    entries = Gauge("opd_pool_entries", "Since the pool began, by outcome.", ["teacher", "what"], registry=registry)
    for teacher, state in states.items():
        replicas.labels(teacher).set(len(state.replicas))
        total_tokens.labels(teacher).set(state.backlog_tokens)
        memory.labels(teacher).set(state.used_memory_bytes)
        memory_limit.labels(teacher).set(state.max_memory_bytes)
        oldest.labels(teacher).set(state.oldest_age_s)
        tokens.labels(teacher).set(state.totals.get("completed_tokens", 0))
        # From 0, so that a rate sees the first of a kind.
        for what in OUTCOMES:
            entries.labels(teacher, what).set(state.totals.get(what, 0))
    return generate_latest(registry)


class _QuietServer(uvicorn.Server):
    """uvicorn without signal handlers of its own: `Shutdown` is the one owner."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_pool(config: PoolConfig, shutdown: Shutdown, on_ready: Callable[[int], None] | None = None) -> None:
    """Serves until `shutdown` is requested; `on_ready` is told the port.

    Redis may be away at the start and at any time: answers are 503 meanwhile, and the process stays.
    """
    access = QueueAccess(redis_url=config.redis_url, trust_network=config.trust_network)
    connection = access.connect(config.patience_s)
    watch = PoolWatch(connection, config.teachers, cache_s=config.cache_s)
    listener = _listen(config.host, config.port)
    port = listener.getsockname()[1]
    server = _QuietServer(uvicorn.Config(build_app(watch), log_config=None, access_log=False))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(shutdown.requested.wait())
    try:
        _log.info("pools %s on http://%s:%d", ", ".join(config.teachers), config.host, port)
        if on_ready is not None:
            on_ready(port)
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        server.should_exit = True
        await serving
        listener.close()
        await connection.close()


def _listen(host: str, port: int) -> socket.socket:
    """Bound here, because uvicorn ends the process where it cannot bind."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"port={port}: cannot be listened on at {host} ({error.strerror}); choose another") from None


def run_pool(config: Path | None, overrides: Sequence[str]) -> int:
    """`opd pool serve`: until SIGTERM or SIGINT."""
    settings = load_settings(PoolConfig, config, overrides)
    configure_logging(settings.log_level, as_json=settings.log_json)

    async def run() -> None:
        shutdown = Shutdown()
        shutdown.install(asyncio.get_running_loop())
        await serve_pool(settings, shutdown)

    asyncio.run(run())
    return 0


def dead_letters(access: QueueAccess, teacher: str) -> list[DeadLetter]:
    """`opd pool dead list`."""
    return _with_pool(access, teacher, list_dead)


def dead_letter(access: QueueAccess, teacher: str, tenant: str, dead_id: str) -> tuple[DeadLetter, ScoreRequest]:
    """`opd pool dead show`: the letter and its request, decoded."""
    letter, body = _with_pool(access, teacher, lambda connection, pool: show_dead(connection, pool, tenant, dead_id))
    return letter, decode_request(body)


def requeue_dead_letter(access: QueueAccess, teacher: str, tenant: str, dead_id: str) -> str:
    """`opd pool dead requeue`: returns the new entry id."""
    if not re.fullmatch(r"\d+-\d+", dead_id):
        raise ConfigError(f"DEAD_ID={dead_id}: is no entry id; take one that `opd pool dead list` shows")
    return _with_pool(access, teacher, lambda connection, pool: requeue_dead(connection, pool, tenant, dead_id))


def promote(access: QueueAccess, name: str, pool: str, *, is_forced: bool = False) -> str | None:
    """`opd pool promote`: lets the teacher's name lead to `pool` and returns where it led before."""
    return asyncio.run(_once(access, lambda connection: promote_pool(connection, name, pool, is_forced=is_forced)))


def _with_pool(access: QueueAccess, teacher: str, act: Callable[[QueueConnection, str], Awaitable[_T]]) -> _T:
    async def resolved(connection: QueueConnection) -> _T:
        return await act(connection, await resolve_pool(connection, teacher))

    return asyncio.run(_once(access, resolved))


async def _once(access: QueueAccess, act: Callable[[QueueConnection], Awaitable[_T]]) -> _T:
    async with access.opened() as connection:
        return await act(connection)
