"""Traces: one per rollout, from its sampling to its scores, across all processes it passes through.

Off unless a composition root calls `configure_tracing`; until then every call here returns at once, and OpenTelemetry
is not imported. What links processes is the W3C trace context that travels in a request (`ScoreRequest.traceparent`),
over the queue and gRPC alike. Spans hold names, numbers and ids, never tokens or text.
"""

import logging
import re
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from pydantic import Field

from opd.errors import ConfigError
from opd.settings import Settings

_log = logging.getLogger(__name__)
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
_CLOSE_S = 5.0
_EXPORT_S = 4
_NS = 1_000_000_000

Value = str | int | float | bool

_tracer: Any = None


class TracingSettings(Settings):
    """Where traces go."""

    enabled: bool = False
    """Off unless told; needs the packages of the extra `tracing`."""
    endpoint: str = Field(default="http://127.0.0.1:4318/v1/traces", pattern="^https?://")
    """Where a collector takes OTLP over HTTP."""
    fraction: float = Field(default=1.0, ge=0, le=1)
    """Share of rollouts that are traced, decided where a trace begins: the trainer."""


class Span:
    """One piece of work; as a context it ends with the block, marked by the error that ended it."""

    def __init__(self, span: Any = None, traceparent: str = "") -> None:
        self._span = span
        self.traceparent = traceparent
        """To hand on; empty where nothing is traced."""

    def child(self, name: str) -> "Span":
        """Begins a part of this one."""
        return begin(name, parent=self.traceparent)

    def end(self, error: BaseException | None = None) -> None:
        """Once; a second call does nothing."""
        span, self._span = self._span, None
        if span is None:
            return
        if error is not None:
            _mark(span, error)
        span.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)


NO_SPAN = Span()
"""What there is while tracing is off; nothing is kept of it."""


def is_on() -> bool:
    """Whether this process traces."""
    return _tracer is not None


def begin(name: str, *, parent: str | None, start_s: float | None = None, **attributes: Value) -> Span:
    """A span under `parent`; None begins a trace, and an empty one is that of somebody who does not trace."""
    # Read once: another thread may end the tracing meanwhile.
    tracer = _tracer
    if tracer is None or parent == "":
        return NO_SPAN
    start_ns = None if start_s is None else int(start_s * _NS)
    span = tracer.start_span(name, context=_context(parent), start_time=start_ns, attributes=attributes)
    found = span.get_span_context()
    return Span(span, f"00-{found.trace_id:032x}-{found.span_id:016x}-{int(found.trace_flags):02x}")


def record(name: str, *, parent: str, start_s: float, end_s: float, **attributes: Value) -> None:
    """A span that is over; times are seconds since the epoch."""
    tracer = _tracer
    if tracer is None or not parent:
        return
    span = tracer.start_span(name, context=_context(parent), start_time=int(start_s * _NS), attributes=attributes)
    span.end(end_time=int(end_s * _NS))


def checked_traceparent(text: str) -> str:
    """The trace context as it came, empty where it is none: a trace is no reason to refuse a request."""
    return text if text and _TRACEPARENT.fullmatch(text) else ""


def configure_tracing(settings: TracingSettings, *, service: str, instance: str) -> Callable[[], None]:
    """Begins to trace where the settings say so; returns what ends it within seconds, sending what is left.

    ConfigError without the packages. A collector that is away costs spans and a warning, nothing else.
    """
    global _tracer
    if not settings.enabled:
        return lambda: None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError:
        raise ConfigError(
            "tracing.enabled=true: OpenTelemetry is not installed; pip install 'opd-services[tracing]', or leave it off"
        ) from None
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.fraction)),
        resource=Resource.create({"service.name": service, "service.instance.id": instance}),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=settings.endpoint, timeout=_EXPORT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    _tracer = provider.get_tracer("opd")
    return lambda: _close(provider)


def _close(provider: Any) -> None:
    global _tracer
    _tracer = None
    thread = threading.Thread(target=provider.shutdown, name="close-tracing", daemon=True)
    thread.start()
    thread.join(_CLOSE_S)
    if thread.is_alive():
        _log.warning("the last spans were not sent within %.0f s", _CLOSE_S)


def _context(parent: str | None) -> Any:
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    found = _TRACEPARENT.fullmatch(parent or "")
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    return set_span_in_context(NonRecordingSpan(SpanContext(trace_id, span_id, True, TraceFlags(flags))))


def _mark(span: Any, error: BaseException) -> None:
    from opentelemetry.trace import Status, StatusCode

    # The code and not the message, which may quote what a caller sent.
    span.set_status(Status(StatusCode.ERROR, str(getattr(error, "code", type(error).__name__))))
