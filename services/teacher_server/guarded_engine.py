"""An engine whose failures hit only who caused them.

A batch that raises is scored again one request at a time, so that a poison request fails alone. Whenever a request
fails or comes out non-finite, the canary decides whose fault it is: with a sound engine it is the request's own; with
an unsound one the request gets a retryable error, because another replica will score it. Runs in the engine thread.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opd.errors import InternalError, NonFiniteError, OpdError, TeacherUnavailableError
from opd.logs import bound
from opd.types import ScoreRequest, Scores, SharedHead, TeacherInfo
from services.teacher_server.canary import Canary, CanaryVerdict
from services.teacher_server.engines.base import ScoringEngine

_log = logging.getLogger(__name__)
_MAX_NAMED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardedOutcomes:
    """One outcome per request; the canary's verdict when it was asked."""

    outcomes: list[Scores | OpdError]
    verdict: CanaryVerdict | None = None


class GuardedEngine:
    """What the scoring loop calls; never raises for what a request does to the engine."""

    def __init__(self, engine: ScoringEngine, canary: Canary) -> None:
        self._engine = engine
        self._canary = canary

    def info(self) -> TeacherInfo:
        """The engine's handshake."""
        return self._engine.info()

    def output_head(self) -> SharedHead:
        """The engine's output head."""
        return self._engine.output_head()

    def check(self) -> CanaryVerdict:
        """Scores the probe; what an unsound engine has kept is never used again."""
        verdict = self._canary.check()
        if not verdict.is_sound:
            self._engine.forget()
        return verdict

    def close(self) -> None:
        """Frees the engine."""
        self._engine.close()

    def score(self, requests: Sequence[ScoreRequest], about: Sequence[Mapping[str, object]] = ()) -> GuardedOutcomes:
        """Scores together, or one by one when together fails; `about` has each request's fields for log lines."""
        try:
            return self._with_verdict(self._engine.score(requests))
        except Exception:
            _tell_failure(requests, about)
        if len(requests) == 1:
            return self._with_verdict([_own_fault(requests[0])])
        parts: list[GuardedOutcomes] = []
        for place, request in enumerate(requests):
            parts.append(self.score([request], about[place : place + 1]))
            verdict = parts[-1].verdict
            if verdict is not None and not verdict.is_sound:
                # The rest would fail for the same reason; spare them the wait.
                rest: list[Scores | OpdError] = [_unsound(verdict) for _ in requests[place + 1 :]]
                parts.append(GuardedOutcomes(outcomes=rest, verdict=verdict))
                break
        verdicts = [part.verdict for part in parts if part.verdict is not None]
        return GuardedOutcomes(
            outcomes=[outcome for part in parts for outcome in part.outcomes],
            verdict=verdicts[-1] if verdicts else None,
        )

    def _with_verdict(self, outcomes: list[Scores | OpdError]) -> GuardedOutcomes:
        suspicious = [isinstance(outcome, NonFiniteError | InternalError) for outcome in outcomes]
        if not any(suspicious):
            return GuardedOutcomes(outcomes=outcomes)
        verdict = self.check()
        if not verdict.is_sound:
            outcomes = [
                _unsound(verdict) if is_suspicious else outcome
                for outcome, is_suspicious in zip(outcomes, suspicious, strict=True)
            ]
        return GuardedOutcomes(outcomes=outcomes, verdict=verdict)


def _tell_failure(requests: Sequence[ScoreRequest], about: Sequence[Mapping[str, object]]) -> None:
    """The traceback that is being handled, with what it is about: one request's fields, or a list of each."""
    named = [f"{request.rollout_id} of {request.tenant}" for request in requests[:_MAX_NAMED]]
    if len(requests) > _MAX_NAMED:
        named.append(f"{len(requests) - _MAX_NAMED} more")
    if len(requests) == 1:
        fields = dict(about[0]) if about else {}
    else:
        fields = {f"{name}s": [each.get(name) for each in about] for name in ("request", "rollout", "tenant")}
    with bound(**fields):
        _log.exception("the engine failed on a batch of %d (%s)", len(requests), ", ".join(named))


def _own_fault(request: ScoreRequest) -> OpdError:
    return InternalError(
        f"rollout {request.rollout_id}: the engine fails on this request of {request.num_tokens} tokens by itself; "
        "the teacher's log has the traceback"
    )


def _unsound(verdict: CanaryVerdict) -> OpdError:
    return TeacherUnavailableError(f"this replica's engine is unsound ({verdict.reason}); ask another replica")
