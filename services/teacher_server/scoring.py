"""TeacherScoring: the one handler behind gRPC, HTTP and the queue.

A request is checked, admitted to the ledger, waits for its turn, is scored with others in the engine thread, and is
answered; every way out of that is an `OpdError`, which is counted by the shell that answers. Knows no transport. All
state belongs to the event loop; the engine thread only computes, and there is one, because an engine is not made to be
shared.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from opd import tracing
from opd.errors import DeadlineExceededError, OpdError, TeacherUnavailableError, UnsupportedError
from opd.logs import bound_fields
from opd.metrics import TeacherMetrics
from opd.types import Capability, ScoreReply, ScoreRequest, Scores, SharedHead, TeacherInfo
from services.teacher_server.batcher import FairBatcher, Intake, Ticket
from services.teacher_server.canary import CanaryVerdict
from services.teacher_server.engines.base import ForwardReport
from services.teacher_server.guarded_engine import GuardedEngine, GuardedOutcomes
from services.teacher_server.readiness import Part, Readiness
from services.teacher_server.request_checks import check_request

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class TeacherScoring:
    """Validate, admit, batch, score, answer.

    `run` must be running for anything to be scored; `executor` has exactly one thread.
    """

    def __init__(
        self,
        engine: GuardedEngine,
        batcher: FairBatcher,
        executor: ThreadPoolExecutor,
        *,
        readiness: Readiness,
        metrics: TeacherMetrics,
        replica: str,
        linger_s: float = 0.002,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._batcher = batcher
        self._executor = executor
        self._readiness = readiness
        self._metrics = metrics
        self._replica = replica
        self._linger_s = linger_s
        self._clock = clock
        self._answers: dict[Ticket, asyncio.Future[ScoreReply]] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._engine_turn = asyncio.Lock()
        self._busy_since_s: float | None = None
        self.num_scored = 0
        """Requests answered with scores."""

    def info(self) -> TeacherInfo:
        """The handshake."""
        return self._engine.info()

    def output_head(self) -> SharedHead:
        """The output head; UnsupportedError where hidden states are not served."""
        info = self.info()
        if Capability.HIDDEN_STATES not in info.capabilities:
            raise UnsupportedError(
                f"output head: {info.teacher} does not serve hidden states; set hidden_states.enabled=true on the "
                "teacher, or use candidates and top-k"
            )
        return self._engine.output_head()

    @property
    def num_in_flight(self) -> int:
        """Requests admitted and not answered, or whose answer is being read."""
        return len(self._answers)

    @property
    def stalled_s(self) -> float:
        """How long the engine has worked without finishing a forward pass; 0 when idle."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else max(0.0, self._clock() - since_s)

    @property
    def is_engine_busy(self) -> bool:
        """The engine thread is at work."""
        return self._busy_since_s is not None

    def collect_direct_tokens(self) -> dict[str, int]:
        """Tokens by tenant that direct callers had since the last call: the queue counts them against its shares."""
        return self._batcher.collect_direct_tokens()

    def note_progress(self, _report: ForwardReport) -> None:
        """A forward pass is done; may be called from the engine thread."""
        if self._busy_since_s is not None:
            self._busy_since_s = self._clock()

    async def score(
        self,
        request: ScoreRequest,
        *,
        intake: Intake = Intake.DIRECT,
        alone: bool = False,
        age_s: float = 0.0,
        patience_s: float | None = None,
    ) -> ScoreReply:
        """The answer to one request, or an OpdError; cancelling gives it up.

        `age_s` is what of its time-out passed before it came here; `patience_s` is the caller's own limit from now.
        """
        check_request(request, self.info())
        ticket = self._admit(request, intake, alone, age_s, patience_s)
        try:
            return await self._answer_to(ticket)
        finally:
            self._give_up(ticket)

    async def score_streamed(
        self, request: ScoreRequest, *, patience_s: float | None = None
    ) -> tuple[ScoreReply, Callable[[], None]]:
        """As `score` for an answer that goes out in chunks, so that it may be long and hold hidden states.

        What is being read is in memory, so its tokens stay in the ledger until the second value is called.
        """
        check_request(request, self.info(), is_streamed=True)
        ticket = self._admit(request, Intake.DIRECT, False, 0.0, patience_s)
        try:
            return await self._answer_to(ticket), lambda: self._give_up(ticket)
        except BaseException:
            self._give_up(ticket)
            raise

    def _admit(
        self, request: ScoreRequest, intake: Intake, alone: bool, age_s: float, patience_s: float | None
    ) -> Ticket:
        if reason := self._readiness.why_not_scoring():
            raise _not_here(reason)
        now_s, left_s = self._clock(), request.timeout_ms / 1000 - age_s
        if patience_s is not None:
            left_s = min(left_s, patience_s)
        if left_s <= 0:
            raise _too_late(request, 0.0)
        ticket = self._batcher.admit(
            request,
            intake=intake,
            alone=alone or request.batch_invariant,
            now_s=now_s - age_s,
            deadline_s=now_s + left_s,
        )
        ticket.entered_at_s, ticket.log_fields = now_s, bound_fields()
        self._answers[ticket] = asyncio.get_running_loop().create_future()
        self._idle.clear()
        self._show_load()
        self._wake.set()
        return ticket

    async def _answer_to(self, ticket: Ticket) -> ScoreReply:
        answer, left_s = self._answers[ticket], ticket.deadline_s - self._clock()
        await asyncio.wait({answer}, timeout=left_s)
        if not answer.done():
            raise _too_late(ticket.request, left_s)
        self._metrics.score_seconds.observe(self._clock() - ticket.admitted_at_s)
        return answer.result()

    async def run(self) -> None:
        """Deals batches to the engine for ever; an exception here ends the process."""
        while True:
            if not self._wake.is_set():
                await self._wake.wait()
                # From idle, a moment's patience lets a burst share its first forward pass.
                await asyncio.sleep(self._linger_s)
            batch = self._batcher.next_batch()
            if batch:
                await self._score_batch(batch)
            else:
                self._wake.clear()

    async def check_canary(self) -> CanaryVerdict:
        """Scores the probe between two batches and applies the verdict to readiness."""
        verdict = await self._in_engine_thread(self._engine.check)
        self._apply(verdict)
        return verdict

    async def drain(self, patience_s: float) -> bool:
        """Waits for what was admitted; True when nothing is left."""
        try:
            async with asyncio.timeout(patience_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Frees the engine; nothing is scored afterwards."""
        await self._in_engine_thread(self._engine.close)

    def abandon(self, reason: str) -> int:
        """Answers everything in flight with a retryable error; returns how many."""
        return self._refuse(list(self._answers), reason)

    def release_waiting(self, intake: Intake, reason: str) -> int:
        """Answers what the intake brought and the engine has not begun with a retryable error; returns how many."""
        found = [ticket for ticket in self._answers if ticket.intake is intake and not ticket.is_dealt]
        return self._refuse(found, reason)

    def _refuse(self, tickets: list[Ticket], reason: str) -> int:
        waiting = [ticket for ticket in tickets if not self._answers[ticket].done()]
        for ticket in waiting:
            self._answers[ticket].set_exception(_not_here(reason))
            if not ticket.is_dealt:
                self._batcher.settle(ticket)
        return len(waiting)

    async def _score_batch(self, batch: list[Ticket]) -> None:
        requests, about = [ticket.request for ticket in batch], [ticket.log_fields for ticket in batch]
        dealt_s = began_s = self._clock()

        def score() -> GuardedOutcomes:
            nonlocal began_s
            # The engine may have had to end a probe first.
            began_s = self._clock()
            return self._engine.score(requests, about)

        try:
            guarded = await self._in_engine_thread(score)
        finally:
            for ticket in batch:
                ticket.is_scored = True
                if ticket not in self._answers:
                    self._batcher.settle(ticket)
        if guarded.verdict is not None:
            self._apply(guarded.verdict)
        took_s = self._clock() - began_s
        if tracing.is_on():
            _trace(batch, began_s=began_s, took_s=took_s, waited_s=began_s - dealt_s)
        num_tokens = sum(ticket.num_tokens for ticket in batch)
        self._batcher.record_speed(num_tokens, took_s)
        for ticket, outcome in zip(batch, guarded.outcomes, strict=True):
            queue_s = began_s - ticket.admitted_at_s
            self._metrics.queue_age_seconds.observe(queue_s)
            self._count_usage(ticket, outcome, took_s * ticket.num_tokens / num_tokens)
            self._answer(ticket, outcome, queue_s=queue_s, engine_s=took_s)
        self._show_load()

    def _count_usage(self, ticket: Ticket, outcome: Scores | OpdError, engine_s: float) -> None:
        if isinstance(outcome, Scores):
            self.num_scored += 1
            self._metrics.count_usage(ticket.tenant, num_tokens=ticket.num_tokens, engine_s=engine_s)

    def _answer(self, ticket: Ticket, outcome: Scores | OpdError, *, queue_s: float, engine_s: float) -> None:
        answer = self._answers.get(ticket)
        if answer is None or answer.done():
            return
        if isinstance(outcome, OpdError):
            answer.set_exception(outcome)
            return
        answer.set_result(
            ScoreReply(
                rollout_id=ticket.request.rollout_id,
                teacher_fingerprint=self.info().fingerprint,
                scores=outcome,
                queue_ms=1000 * queue_s,
                engine_ms=1000 * engine_s,
                replica=self._replica,
            )
        )

    async def _in_engine_thread(self, work: Callable[[], _T]) -> _T:
        async with self._engine_turn:
            self._busy_since_s = self._clock()
            try:
                return await asyncio.get_running_loop().run_in_executor(self._executor, work)
            finally:
                self._busy_since_s = None

    def _apply(self, verdict: CanaryVerdict) -> None:
        self._metrics.canary_sound.set(verdict.is_sound)
        if verdict.is_sound:
            self._readiness.clear(Part.CANARY)
        else:
            _log.error("canary %s: %s; this replica takes no requests", verdict.state, verdict.reason)
            self._readiness.hold(Part.CANARY, verdict.reason)
            # What an unsound engine would still answer may look like scores.
            self.abandon(verdict.reason)

    def _give_up(self, ticket: Ticket) -> None:
        """Forgets a ticket; one that is being scored stays in the ledger until its batch is done. Twice is once."""
        answer = self._answers.pop(ticket, None)
        if answer is None:
            return
        if answer.done():
            # Read, so that an answer nobody waited for is not reported as lost.
            answer.exception()
        if not self._answers:
            self._idle.set()
        if ticket.is_scored or not ticket.is_dealt:
            self._batcher.settle(ticket)
        self._show_load()

    def _show_load(self) -> None:
        self._metrics.in_flight_tokens.set(self._batcher.held_tokens())
        self._metrics.waiting_requests.set(self._batcher.num_waiting)


def _trace(batch: list[Ticket], *, began_s: float, took_s: float, waited_s: float) -> None:
    """Each request's wait and the pass it shared; `began_s` is on the tickets' clock, and the pass has just ended.

    `waited_s` is what the batch, closed already, waited for the engine.
    """
    num_tokens = sum(ticket.num_tokens for ticket in batch)
    ended_s = time.time()
    start_s = ended_s - took_s
    for ticket in batch:
        parent, entered_s = ticket.request.traceparent, start_s - (began_s - ticket.entered_at_s)
        tracing.record("batch_wait", parent=parent, start_s=entered_s, end_s=start_s, waited_s=waited_s)
        tracing.record(
            "engine_pass",
            parent=parent,
            start_s=start_s,
            end_s=ended_s,
            batch_requests=len(batch),
            batch_tokens=num_tokens,
        )


class ScoringSlot:
    """Where the shells find the handler; empty while the model is being loaded."""

    def __init__(self) -> None:
        self._scoring: TeacherScoring | None = None

    def fill(self, scoring: TeacherScoring) -> None:
        """From now on requests are handled."""
        self._scoring = scoring

    def get(self) -> TeacherScoring:
        """Raises TeacherUnavailableError while there is none."""
        if self._scoring is None:
            raise _not_here("the model is being loaded")
        return self._scoring


def _not_here(reason: str) -> OpdError:
    return TeacherUnavailableError(f"this replica takes no requests ({reason}); ask another one")


def _too_late(request: ScoreRequest, waited_s: float) -> OpdError:
    return DeadlineExceededError(
        f"timeout_ms={request.timeout_ms}: not scored in time (waited {waited_s:.2f} s here); ask for more time or "
        "send less at once"
    )
