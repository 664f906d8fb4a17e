"""A rollout's way to its scores as logs and traces tell it: sampled, sent, scored or not.

One trace per rollout: the root span lasts from the beginning of the step's sampling to the reply. Log lines name
rollout, tenant and policy version, as the teacher's do.
"""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from opd import tracing
from opd.logs import REQUEST_LOG
from opd.tracing import NO_SPAN, Span
from opd.types import Rollout, ScoreReply

_log = logging.getLogger(REQUEST_LOG)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutJourney:
    """From the moment a rollout is sent; as a context it also ends with an error that keeps it from being sent."""

    fields: Mapping[str, object]
    """Of its log lines."""
    span: Span = NO_SPAN

    @classmethod
    def begin(cls, rollout: Rollout, *, tenant: str, teacher: str, sampling_s: float) -> Self:
        """`sampling_s` is when the step's sampling began, in seconds since the epoch."""
        fields: dict[str, object] = {
            "rollout": rollout.rollout_id,
            "tenant": tenant,
            "policy_version": rollout.policy_version,
        }
        if not tracing.is_on():
            return cls(fields=fields)
        tokens = int(rollout.response_token_ids.size)
        span = tracing.begin(
            "rollout",
            parent=None,
            start_s=sampling_s,
            rollout=rollout.rollout_id,
            tenant=tenant,
            teacher=teacher,
            policy_version=rollout.policy_version,
            response_tokens=tokens,
        )
        tracing.record("sample", parent=span.traceparent, start_s=sampling_s, end_s=time.time())
        return cls(fields=fields, span=span)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.span.end(error)
            self._tell("was not sent", error)

    @property
    def traceparent(self) -> str:
        return self.span.traceparent

    def follow(self, reply: "Future[ScoreReply]") -> "Future[ScoreReply]":
        """Returns what it was given; its end is told wherever it comes about."""
        is_logged = _log.isEnabledFor(logging.INFO)
        if is_logged:
            _log.info("sent rollout %s", self.fields["rollout"], extra=self.fields)
        if is_logged or self.traceparent:
            reply.add_done_callback(self._end)
        return reply

    def _end(self, reply: "Future[ScoreReply]") -> None:
        error = None if reply.cancelled() else reply.exception()
        self.span.end(error)
        if reply.cancelled():
            _log.info("gave up rollout %s", self.fields["rollout"], extra=self.fields)
        elif error is not None:
            self._tell("was not scored", error)
        else:
            by = {"replica": reply.result().replica, "teacher_fingerprint": reply.result().teacher_fingerprint}
            _log.info("scored rollout %s", self.fields["rollout"], extra={**self.fields, **by})

    def _tell(self, what_happened: str, error: BaseException) -> None:
        code = getattr(error, "code", type(error).__name__)
        extra = {**self.fields, "code": code}
        _log.info("rollout %s %s: %s", self.fields["rollout"], what_happened, error, extra=extra)
