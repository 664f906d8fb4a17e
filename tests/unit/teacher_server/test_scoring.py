import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest

from opd.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    NonFiniteError,
    OverCapacityError,
    TeacherUnavailableError,
)
from opd.metrics import TeacherMetrics
from opd.types import ScoreReply, ScoreRequest
from services.teacher_server.batcher import BatchLimits, FairBatcher, Intake
from services.teacher_server.canary import Canary, CanaryState
from services.teacher_server.guarded_engine import GuardedEngine
from services.teacher_server.readiness import Part, Readiness
from services.teacher_server.scoring import TeacherScoring
from tests.unit.teacher_server.fake_engine import CRASH_ID, NAN_ID, FakeEngine, until
from tests.unit.teacher_server.tiny_teachers import make_request


class Bench:
    def __init__(self, limits: BatchLimits, executor: ThreadPoolExecutor) -> None:
        self.engine, self.readiness, self.metrics = FakeEngine(), Readiness(), TeacherMetrics()
        canary = Canary(self.engine)
        assert canary.check().is_sound
        self.batcher = FairBatcher(limits)
        self.scoring = TeacherScoring(
            GuardedEngine(self.engine, canary),
            self.batcher,
            executor,
            readiness=self.readiness,
            metrics=self.metrics,
            replica="r1",
            linger_s=0.0,
        )
        self.readiness.clear(Part.START)
        self.engine.batches.clear()

    def start(self, name: str, **arguments: object) -> "asyncio.Task[ScoreReply]":
        return asyncio.create_task(self.scoring.score(named(name), **arguments))  # type: ignore[arg-type]


@asynccontextmanager
async def running(limits: BatchLimits | None = None) -> AsyncIterator[Bench]:
    with ThreadPoolExecutor(1) as executor:
        bench = Bench(limits or BatchLimits(), executor)
        loop = asyncio.create_task(bench.scoring.run())
        try:
            yield bench
        finally:
            bench.engine.gate.set()
            loop.cancel()
            with suppress(asyncio.CancelledError):
                await loop


def named(name: str, token: int = 5, **changes: object) -> ScoreRequest:
    return make_request(rollout_id=name, prompt_token_ids=np.array([token], np.int32), **changes)


async def test_an_answer_carries_scores_identity_and_times() -> None:
    async with running() as bench:
        request = named("a")
        reply = await bench.scoring.score(request)
    assert (reply.rollout_id, reply.teacher_fingerprint, reply.replica) == ("a", "f" * 16, "r1")
    np.testing.assert_allclose(reply.scores.sampled_logprobs, request.response_token_ids / -10, rtol=1e-6)
    assert 0 <= reply.queue_ms < 5000 and 0 <= reply.engine_ms < 5000
    assert b'opd_teacher_tokens_total{tenant="math"} 8.0' in bench.metrics.render()


async def test_what_waits_while_the_engine_works_shares_the_next_batch() -> None:
    async with running() as bench:
        bench.engine.gate.clear()
        first = bench.start("a")
        await until(lambda: bench.engine.scored == [["a"]])
        others = [bench.start(name) for name in "bcd"]
        await until(lambda: bench.batcher.num_waiting == 3)
        bench.engine.gate.set()
        replies = await asyncio.gather(first, *others)
    assert bench.engine.scored == [["a"], ["b", "c", "d"]]
    assert [reply.rollout_id for reply in replies] == ["a", "b", "c", "d"]
    assert bench.batcher.held_tokens() == 0 and bench.scoring.num_in_flight == 0


async def test_a_marked_request_and_a_batch_invariant_one_are_scored_alone() -> None:
    async with running() as bench:
        bench.engine.gate.clear()
        tasks = [bench.start("a")]
        await until(lambda: bench.engine.scored == [["a"]])
        tasks += [bench.start("b"), bench.start("again", alone=True, intake=Intake.QUEUE), bench.start("c")]
        tasks += [asyncio.create_task(bench.scoring.score(named("fixed", batch_invariant=True)))]
        await until(lambda: bench.batcher.num_waiting == 4)
        bench.engine.gate.set()
        await asyncio.gather(*tasks)
    assert bench.engine.scored == [["a"], ["b"], ["again"], ["c"], ["fixed"]]


async def test_a_bad_request_never_reaches_ledger_or_engine() -> None:
    async with running() as bench:
        with pytest.raises(InvalidRequestError, match="prompt_token_ids"):
            await bench.scoring.score(named("a", token=4000))
        assert bench.engine.batches == [] and bench.batcher.held_tokens() == 0
    # Counted by the shell that answers, and not here as well.
    assert b'opd_teacher_errors_total{code="invalid_request"} 0.0' in bench.metrics.render()


async def test_one_requests_fault_is_its_own_whatever_kind_it_is() -> None:
    async with running() as bench:
        bench.engine.gate.clear()
        first = bench.start("first")
        await until(lambda: bench.engine.scored == [["first"]])
        requests = [named("a"), named("nan", NAN_ID), named("crash", CRASH_ID), named("b")]
        tasks = [asyncio.create_task(bench.scoring.score(request)) for request in requests]
        await until(lambda: bench.batcher.num_waiting == 4)
        bench.engine.gate.set()
        await first
        found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(item) for item in found] == [ScoreReply, NonFiniteError, InternalError, ScoreReply]
    assert bench.readiness.is_ready


async def test_a_deadline_is_answered_when_it_passes_not_when_the_engine_is_done() -> None:
    async with running() as bench:
        bench.engine.gate.clear()
        blocker = bench.start("a")
        await until(lambda: bench.engine.scored == [["a"]])
        started_s = time.monotonic()
        with pytest.raises(DeadlineExceededError, match="timeout_ms=50"):
            await bench.scoring.score(named("late", timeout_ms=50))
        assert time.monotonic() - started_s < 1.0
        assert bench.batcher.num_waiting == 0
        bench.engine.gate.set()
        await blocker
    assert bench.engine.scored == [["a"]]


async def test_the_deadline_counts_from_admission_elsewhere_and_the_callers_patience() -> None:
    async with running() as bench:
        with pytest.raises(DeadlineExceededError):
            await bench.scoring.score(named("old", timeout_ms=5000), age_s=5.1, intake=Intake.QUEUE)
        bench.engine.gate.clear()
        with pytest.raises(DeadlineExceededError):
            await bench.scoring.score(named("hasty"), patience_s=0.05)
        bench.engine.gate.set()


async def test_a_caller_that_leaves_gives_its_tokens_back() -> None:
    async with running(BatchLimits(max_tenant_tokens=20)) as bench:
        bench.engine.gate.clear()
        first = bench.start("a")
        await until(lambda: bench.engine.scored == [["a"]])
        second = bench.start("b")
        await until(lambda: bench.batcher.num_waiting == 1)
        with pytest.raises(OverCapacityError, match="tenant math already hold 16 of 20") as caught:
            await bench.scoring.score(named("c"))
        assert caught.value.retry_after_s is not None and caught.value.retryable
        for task in (first, second):
            task.cancel()
        await asyncio.wait({first, second})
        assert bench.batcher.held_tokens() == 8, "what the engine is working on stays in the ledger"
        bench.engine.gate.set()
        await until(lambda: bench.batcher.held_tokens() == 0)
        await bench.scoring.score(named("d"))
    assert bench.engine.scored == [["a"], ["d"]]


async def test_an_unsound_engine_stops_the_replica_and_frees_those_who_wait() -> None:
    async with running() as bench:
        bench.engine.gate.clear()
        first = bench.start("a")
        await until(lambda: bench.engine.scored == [["a"]])
        second = bench.start("b")
        await until(lambda: bench.batcher.num_waiting == 1)
        bench.engine.is_broken = True
        bench.engine.gate.set()
        found = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(item) for item in found] == [TeacherUnavailableError] * 2
        assert "device-side assert" in bench.readiness.describe() and not bench.readiness.is_ready
        with pytest.raises(TeacherUnavailableError, match="takes no requests"):
            await bench.scoring.score(named("c"))
        bench.engine.is_broken = False
        assert (await bench.scoring.check_canary()).state is CanaryState.SOUND
        await bench.scoring.score(named("d"))
    assert bench.engine.scored == [["a"], ["d"]]


async def test_a_drifted_canary_lets_no_more_scores_out() -> None:
    async with running() as bench:
        bench.engine.gate.clear()
        first = bench.start("a")
        await until(lambda: bench.engine.scored == [["a"]])
        second = bench.start("b")
        check = asyncio.create_task(bench.scoring.check_canary())
        await until(lambda: bench.batcher.num_waiting == 1)
        bench.engine.shift = 0.5
        bench.engine.gate.set()
        assert (await check).state is CanaryState.DRIFTED
        await first
        with pytest.raises(TeacherUnavailableError, match=r"moved by 0\.5"):
            await second


async def test_draining_waits_for_answers_and_says_when_it_could_not() -> None:
    async with running() as bench:
        assert await bench.scoring.drain(0.01)
        bench.engine.gate.clear()
        task = bench.start("a")
        await until(lambda: bench.engine.scored == [["a"]])
        assert not await bench.scoring.drain(0.05)
        waiting = asyncio.create_task(bench.scoring.drain(5))
        bench.engine.gate.set()
        assert await waiting and (await task).rollout_id == "a"


async def test_the_stall_clock_runs_while_the_engine_works_and_restarts_with_each_forward() -> None:
    async with running() as bench:
        assert bench.scoring.stalled_s == 0.0
        bench.engine.gate.clear()
        task = bench.start("a")
        await until(lambda: bench.scoring.stalled_s > 0.05)
        bench.engine.observe = bench.scoring.note_progress
        bench.engine.gate.set()
        await task
        assert bench.scoring.stalled_s == 0.0


async def test_a_request_larger_than_every_cap_is_scored_by_itself() -> None:
    limits = BatchLimits(max_batch_tokens=10, max_tenant_tokens=10, max_direct_tokens=10, quantum_tokens=3)
    async with running(limits) as bench:
        large = replace(named("large"), response_token_ids=np.ones(100, np.int32))
        assert (await bench.scoring.score(large)).rollout_id == "large"


async def test_an_answer_that_is_being_read_stays_in_the_ledger() -> None:
    async with running(BatchLimits(max_tenant_tokens=12)) as bench:
        reply, release = await bench.scoring.score_streamed(named("a"))
        assert reply.rollout_id == "a" and bench.batcher.held_tokens() == 8
        assert b"opd_teacher_in_flight_tokens 8.0" in bench.metrics.render()
        with pytest.raises(OverCapacityError, match="tenant math already hold 8 of 12"):
            await bench.scoring.score(named("b"))
        assert not await bench.scoring.drain(0.05)
        release()
        release()
        assert bench.batcher.held_tokens() == 0 and await bench.scoring.drain(0.05)
        await bench.scoring.score(named("b"))


async def test_a_streamed_request_without_an_answer_leaves_nothing_in_the_ledger() -> None:
    async with running() as bench:
        with pytest.raises(NonFiniteError):
            await bench.scoring.score_streamed(named("a", token=NAN_ID))
        bench.engine.gate.clear()
        with pytest.raises(DeadlineExceededError):
            await bench.scoring.score_streamed(named("b", timeout_ms=50))
        # It is being scored still.
        assert bench.batcher.held_tokens() == 8
        bench.engine.gate.set()
        await until(lambda: bench.batcher.held_tokens() == 0)
        assert bench.scoring.num_in_flight == 0
