"""What is told of a request while it is served, apart from its answer: fields of log lines, spans, one line at the end.

The queue and gRPC shells have this in common. All of it costs next to nothing while neither requests are logged nor
traces are made.
"""

import dataclasses
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from opd import tracing
from opd.errors import OpdError
from opd.logs import REQUEST_LOG, bound
from opd.tracing import NO_SPAN, Span
from opd.types import ScoreReply, ScoreRequest, policy_version_of

_log = logging.getLogger(REQUEST_LOG)


@dataclass(kw_only=True, slots=True)
class Serving:
    """One request from its arrival to its answer."""

    arrived_s: float
    """Since the epoch."""
    age_s: float | None = None
    """What it had waited in the queue when it arrived here; None where it came directly."""
    span: Span = NO_SPAN
    rollout_id: str = ""
    tenant: str = ""

    def opened(self, request: ScoreRequest) -> ScoreRequest:
        """The request was read and may be scored; returns it so that spans of its scoring are parts of this."""
        self.rollout_id, self.tenant = request.rollout_id, request.tenant
        if not request.traceparent or not tracing.is_on():
            return request
        queued_s = self.arrived_s - (self.age_s or 0.0)
        self.span = span = tracing.begin(
            "serve",
            parent=request.traceparent,
            start_s=queued_s,
            rollout=request.rollout_id,
            tenant=request.tenant,
            tokens=request.num_tokens,
        )
        if self.age_s is not None:
            tracing.record("queue_wait", parent=span.traceparent, start_s=queued_s, end_s=self.arrived_s)
        tracing.record("intake", parent=span.traceparent, start_s=self.arrived_s, end_s=time.time())
        return dataclasses.replace(request, traceparent=span.traceparent)

    def scored(self, reply: ScoreReply) -> None:
        """One line, where requests are logged."""
        if _log.isEnabledFor(logging.INFO):
            times = {"queue_ms": round(reply.queue_ms, 1), "engine_ms": round(reply.engine_ms, 1)}
            _log.info("scored %s of %s", self.rollout_id, self.tenant, extra=times)

    def refused(self, error: OpdError) -> None:
        """The same for a request without scores, and the span says why."""
        self.span.end(error)
        if _log.isEnabledFor(logging.INFO):
            _log.info("refused %s of %s: %s", self.rollout_id, self.tenant, error.message, extra={"code": error.code})


@contextmanager
def serving(request_id: str = "", *, rollout_id: str, tenant: str, age_s: float | None = None) -> Iterator[Serving]:
    """Every log line within names the request, its rollout, its tenant and the policy version that sampled it."""
    fields: dict[str, object] = {"request": request_id or secrets.token_hex(6), "rollout": rollout_id, "tenant": tenant}
    version = policy_version_of(rollout_id)
    if version is not None:
        fields["policy_version"] = version
    found = Serving(arrived_s=time.time(), age_s=age_s, rollout_id=rollout_id, tenant=tenant)
    with bound(**fields):
        try:
            yield found
        finally:
            found.span.end()
