"""A teacher without a model: it sleeps as long as its rate says, and what it answers tells which request it answers.

Everything around it is the real thing: TeacherScoring, the fair batcher, the queue intake, Redis. What is measured with
it is the service's own behaviour, on any machine, without torch.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import numpy as np

from opd.errors import OpdError, UnsupportedError
from opd.metrics import TeacherMetrics
from opd.queue.connection import QueueConnection
from opd.queue.pools import set_limits
from opd.types import Capability, Floats, ScoreRequest, Scores, SharedHead, TeacherInfo
from services.teacher_server.batcher import BatchLimits, FairBatcher
from services.teacher_server.canary import CANARY_ROLLOUT_ID, Canary
from services.teacher_server.config import TeacherConfig
from services.teacher_server.guarded_engine import GuardedEngine
from services.teacher_server.queue_intake import QueueIntake
from services.teacher_server.readiness import Part, Readiness
from services.teacher_server.scoring import TeacherScoring

TEACHER = "sleeper"
VOCABULARY = 32_000


def expected_logprobs(request: ScoreRequest) -> Floats:
    """What the engine answers: of prompt and response alike, so that a mix-up of two requests shows."""
    shift = int(request.prompt_token_ids.sum()) % 1009
    return (-(request.response_token_ids % 97 + 1) / 8 - shift).astype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """One request that the engine has done."""

    at_s: float
    """time.monotonic() at the end of its batch."""
    tenant: str
    num_tokens: int


class SleepingEngine:
    """`tokens_per_s` whatever the batch; 0 answers at once."""

    def __init__(self, tokens_per_s: float) -> None:
        self._tokens_per_s = tokens_per_s
        self.served: list[Served] = []
        self.busy_s = 0.0

    def info(self) -> TeacherInfo:
        return TeacherInfo(
            teacher=TEACHER,
            fingerprint="0" * 16,
            model="sleeping",
            engine="sleeping",
            vocab_rows=VOCABULARY,
            num_defined_ids=VOCABULARY,
            id_map_hash="0" * 32,
            max_context=32_768,
            max_candidates=1,
            max_score_top_k=1,
            max_batch_tokens=1 << 20,
            max_message_bytes=1 << 26,
            capabilities=frozenset({Capability.SAMPLED_LOGPROBS, Capability.BATCH_INVARIANT}),
        )

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores | OpdError]:
        num_tokens = sum(request.num_tokens for request in requests)
        if self._tokens_per_s and requests[0].rollout_id != CANARY_ROLLOUT_ID:
            time.sleep(num_tokens / self._tokens_per_s)
            self.busy_s += num_tokens / self._tokens_per_s
        now_s = time.monotonic()
        self.served += [Served(at_s=now_s, tenant=item.tenant, num_tokens=item.num_tokens) for item in requests]
        return [Scores(sampled_logprobs=expected_logprobs(request)) for request in requests]

    def output_head(self) -> SharedHead:
        """There is no model behind it."""
        raise UnsupportedError("output head: a sleeping engine has none; score with it")

    def forget(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing to free."""


@asynccontextmanager
async def serving(
    url: str, engine: SleepingEngine, config: TeacherConfig, weights: Mapping[str, float] | None = None
) -> AsyncIterator[TeacherScoring]:
    """A replica in this event loop, as the teacher's composition root builds it, without its listeners."""
    batcher = await _batcher_with_shares(url, config, dict(weights or {}))
    batching, readiness, metrics = config.batching, Readiness(), TeacherMetrics()
    canary = Canary(engine)
    canary.check()
    with ThreadPoolExecutor(1, thread_name_prefix="engine") as executor:
        scoring = TeacherScoring(
            GuardedEngine(engine, canary),
            batcher,
            executor,
            readiness=readiness,
            metrics=metrics,
            replica=config.replica,
            linger_s=batching.linger_ms / 1000,
        )
        readiness.clear(Part.START)
        intake = QueueIntake(
            config, QueueConnection(url), scoring, readiness=readiness, metrics=metrics, replica=config.replica
        )
        await intake.start()
        tasks = [asyncio.create_task(scoring.run()), asyncio.create_task(intake.run())]
        try:
            yield scoring
        finally:
            tasks[1].cancel()
            await asyncio.gather(tasks[1], return_exceptions=True)
            await intake.stop(5.0)
            tasks[0].cancel()
            with suppress(asyncio.CancelledError):
                await tasks[0]


async def _batcher_with_shares(url: str, config: TeacherConfig, weights: dict[str, float]) -> FairBatcher:
    """Told in both places where turns are taken, as a replica that follows a tenants file does."""
    connection = QueueConnection(url)
    await connection.open()
    await set_limits(connection, config.teacher, weights=weights, caps={})
    await connection.close()
    batching = config.batching
    limits = BatchLimits(
        max_batch_tokens=batching.max_batch_tokens,
        max_batch_requests=batching.max_batch_requests,
        quantum_tokens=batching.quantum_tokens,
    )
    batcher = FairBatcher(limits)
    batcher.set_shares(weights, {})
    return batcher
