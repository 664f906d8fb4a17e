"""What is told of a request while it is served, apart from its answer: a count of errors, log lines, spans.

All shells have this in common: each call, delivery or HTTP request is one `serving` block, and whatever it is refused
with passes `Serving.refused` once. All of it costs next to nothing while neither requests are logged nor traces are
made.
"""

import dataclasses
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from opd import tracing
from opd.errors import InternalError, OpdError
from opd.logs import REQUEST_LOG, bound
from opd.metrics import TeacherMetrics
from opd.tracing import NO_SPAN, Span
from opd.types import ScoreReply, ScoreRequest, policy_version_of

_log = logging.getLogger(REQUEST_LOG)
_fault_log = logging.getLogger(__name__)
_MAX_ROLLOUT_LENGTH = 200
_MAX_TENANT_LENGTH = 63


@dataclass(kw_only=True, slots=True)
class Serving:
    """One request from its arrival to its answer."""

    metrics: TeacherMetrics
    what: str
    """The method or route that was called: what lines name while no rollout is known."""
    fields: dict[str, object]
    """Of every log line within."""
    arrived_s: float
    """Since the epoch."""
    age_s: float | None = None
    """What it had waited in the queue when it arrived here; None where it came directly."""
    traceparent: str = ""
    """Of whoever asks, once it is known."""
    span: Span = NO_SPAN
    rollout_id: str = ""
    tenant: str = ""

    def about(self, *, rollout_id: str = "", tenant: str = "", traceparent: str = "") -> None:
        """As much as is known of it, however it will end; every line from now on says so."""
        if rollout_id:
            self.rollout_id = self.fields["rollout"] = rollout_id[:_MAX_ROLLOUT_LENGTH]
            if (version := policy_version_of(self.rollout_id)) is not None:
                self.fields["policy_version"] = version
        if tenant:
            self.tenant = self.fields["tenant"] = tenant[:_MAX_TENANT_LENGTH]
        self.traceparent = traceparent or self.traceparent

    def opened(self, request: ScoreRequest) -> ScoreRequest:
        """The request was read and may be scored; returns it so that spans of its scoring are parts of this."""
        self.traceparent = request.traceparent or self.traceparent
        if not self.traceparent or not tracing.is_on():
            return request
        self.span = span = self._begin_span(tokens=request.num_tokens)
        if self.age_s is not None:
            tracing.record("queue_wait", parent=span.traceparent, start_s=self._queued_s, end_s=self.arrived_s)
        tracing.record("intake", parent=span.traceparent, start_s=self.arrived_s, end_s=time.time())
        return dataclasses.replace(request, traceparent=span.traceparent)

    def scored(self, reply: ScoreReply) -> None:
        """One line, where requests are logged."""
        if _log.isEnabledFor(logging.INFO):
            times = {"queue_ms": round(reply.queue_ms, 1), "engine_ms": round(reply.engine_ms, 1)}
            _log.info("scored %s", self._subject, extra=times)

    def refused(self, error: OpdError) -> None:
        """It is answered with this error: counted, told in one line, and the span says why. Once a request."""
        self.metrics.errors.labels(error.code).inc()
        self._end_span(error)
        self._tell("refused", error)

    def handed_back(self, reason: OpdError) -> None:
        """It is not answered here but left to another replica, which is no error of the request's."""
        self._end_span(reason)
        self._tell("handed back", reason)

    def lost(self, error: OpdError) -> None:
        """What it ended with here reached nobody, since it was no longer ours to answer; whoever has it counts."""
        self._end_span(error)
        self._tell("lost", error)

    def failed(self) -> InternalError:
        """What to answer after an exception that nobody foresaw; logs its traceback, so call it while handling that."""
        _fault_log.exception("%s (request %s) failed for a fault of ours", self._subject, self.fields["request"])
        of_which = f"rollout {self.rollout_id}: " if self.rollout_id else ""
        return InternalError(f"{of_which}a fault of the teacher's; its log has the traceback")

    @property
    def _subject(self) -> str:
        subject = self.rollout_id or self.what
        return f"{subject} of {self.tenant}" if self.tenant else subject

    @property
    def _queued_s(self) -> float:
        return self.arrived_s - (self.age_s or 0.0)

    def _begin_span(self, **counts: int) -> Span:
        named = {name: value for name, value in (("rollout", self.rollout_id), ("tenant", self.tenant)) if value}
        return tracing.begin("serve", parent=self.traceparent, start_s=self._queued_s, **named, **counts)

    def _end_span(self, error: OpdError) -> None:
        if self.span is NO_SPAN and self.traceparent and tracing.is_on():
            # Refused before it could be opened.
            self.span = self._begin_span()
        self.span.end(error)

    def _tell(self, how_it_ended: str, error: OpdError) -> None:
        if _log.isEnabledFor(logging.INFO):
            _log.info("%s %s: %s", how_it_ended, self._subject, error.message, extra={"code": error.code})


_current: ContextVar[Serving] = ContextVar("opd_serving")


def current() -> Serving:
    """The request that is being served in this task; only to be asked within `serving`."""
    return _current.get()


@contextmanager
def serving(
    metrics: TeacherMetrics, what: str, *, request_id: str = "", age_s: float | None = None
) -> Iterator[Serving]:
    """Every log line within names the request, and as soon as `about` is told its rollout, tenant and policy version.

    Whatever ends the block ends the span, which is marked when that is an exception. Not to be held over a `yield` of
    an asynchronous generator, which may end in another task.
    """
    with bound(request=request_id or secrets.token_hex(6)) as fields:
        found = Serving(metrics=metrics, what=what, fields=fields, arrived_s=time.time(), age_s=age_s)
        token = _current.set(found)
        try:
            yield found
        except BaseException as error:
            found.span.end(error)
            raise
        finally:
            _current.reset(token)
        found.span.end()
