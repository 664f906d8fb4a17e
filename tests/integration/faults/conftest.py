"""Real replicas that can be broken, a wire that can be cut, and students that check every score they get."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis import Redis

from opd.client import ScoreClient
from opd.queue.client_rules import ClientRules
from opd.queue.keys import GROUP, PoolKeys
from opd.types import ScoreReply, ScoreRequest
from tests.integration.faults.fragile_replica import expected_logprobs

ROOT = Path(__file__).parents[3]
KEYS = PoolKeys("tiny")
PATIENCE_S = 60.0
RULES = ClientRules(heartbeat_ms=4_000, sweep_s=0.5)
NUM_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragile:
    """One replica process and what it said."""

    process: "subprocess.Popen[bytes]"
    ready_file: Path
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    async def ready(self) -> "Fragile":
        await until(lambda: self.ready_file.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log
        return self

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


StartFragile = Callable[..., Fragile]


@pytest.fixture
def start_fragile(tmp_path: Path) -> Iterator[StartFragile]:
    """`start_fragile(url, "r0", "queue.lease_s=5", tokens_per_s=100)`; a batch holds four requests."""
    started: list[Fragile] = []

    def start(url: str, name: str, *overrides: str, tokens_per_s: float = 2_000) -> Fragile:
        folder = tmp_path / f"{name}-{len(started)}"
        folder.mkdir()
        defaults = [
            f"redis_url={url}",
            f"replica={name}-{len(started)}",
            f"batching.max_batch_tokens={4 * NUM_TOKENS}",
            "queue.lease_s=1",
            "queue.announce_s=0.3",
            "queue.max_deliveries=2",
            "log_level=info",
        ]
        module = "tests.integration.faults.fragile_replica"
        given = ["--ready-file", str(folder / "ready.json"), f"tokens_per_s={tokens_per_s}", *defaults, *overrides]
        environment = {**os.environ, "OPD_DIE_WITH_PARENT": str(os.getpid()), "OMP_NUM_THREADS": "1"}
        environment.pop("OPD_REDIS_URL", None)
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *given], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        found = Fragile(process=process, ready_file=folder / "ready.json", log_file=folder / "log.txt")
        started.append(found)
        return found

    yield start
    for replica in started:
        if replica.process.poll() is None:
            replica.process.kill()
        replica.process.wait(10)


def requests_of(count: int, *, run: str = "run", tenant: str = "math", timeout_ms: int = 60_000) -> list[ScoreRequest]:
    """Every other one is the same sample of the same prompt as the one before it, and a rollout of its own."""
    found = []
    for number in range(count):
        ids = np.random.default_rng(number // 2).integers(0, 60, NUM_TOKENS, dtype=np.int32)
        found.append(
            ScoreRequest(
                rollout_id=f"{run}.0.{number}",
                tenant=tenant,
                teacher="tiny",
                prompt_token_ids=ids[:4],
                response_token_ids=ids[4:],
                timeout_ms=timeout_ms,
            )
        )
    return found


class Student:
    """A trainer's client and the tally of what it was answered."""

    def __init__(self, client: ScoreClient) -> None:
        self._client = client
        self._asked: list[ScoreRequest] = []
        self._calls: list[asyncio.Task[ScoreReply]] = []

    @property
    def num_scored(self) -> int:
        return self._client.stats.scored

    @property
    def num_resubmitted(self) -> int:
        return self._client.stats.resubmitted

    def ask(self, requests: Sequence[ScoreRequest]) -> list["asyncio.Task[ScoreReply]"]:
        calls = [asyncio.create_task(self._client.score(request)) for request in requests]
        self._asked += requests
        self._calls += calls
        return calls

    async def check(self) -> list[ScoreReply]:
        """Waits for all; none is lost, none counted twice, each has its own scores, equal samples both."""
        async with asyncio.timeout(PATIENCE_S):
            replies = await asyncio.gather(*self._calls)
        for request, reply in zip(self._asked, replies, strict=True):
            assert reply.rollout_id == request.rollout_id
            np.testing.assert_array_equal(reply.scores.sampled_logprobs, expected_logprobs(request))
        stats = self._client.stats
        assert (stats.sent, stats.scored, stats.failed) == (len(replies), len(replies), 0)
        assert stats.duplicates == 0
        return replies


class StudentContext:
    """`async with student_of(url) as student`."""

    def __init__(self, url: str, tenant: str) -> None:
        self._client = ScoreClient.connect(url, teacher="tiny", tenant=tenant, patience_s=PATIENCE_S, rules=RULES)

    async def __aenter__(self) -> Student:
        await self._client.open()
        return Student(self._client)

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()


def student_of(url: str, tenant: str = "math") -> StudentContext:
    return StudentContext(url, tenant)


class Pool:
    """What Redis says of the pool."""

    def __init__(self, url: str) -> None:
        self.redis: Any = Redis.from_url(url)

    def total(self, name: str) -> int:
        return int(self.redis.hget(KEYS.counters, name) or 0)

    def held_by(self, replica: str, tenant: str = "math") -> int:
        """Entries leased to replicas whose name begins so."""
        stream = KEYS.requests(tenant)
        if not self.redis.exists(stream) or not self.redis.xinfo_groups(stream):
            return 0
        rows = self.redis.xpending_range(stream, GROUP, "-", "+", 1000)
        return sum(row["consumer"].decode().startswith(replica) for row in rows)

    def num_entries(self, tenant: str = "math") -> int:
        return int(self.redis.xlen(KEYS.requests(tenant)))

    def close(self) -> None:
        self.redis.close()


@pytest.fixture
def pool(redis_url: str) -> Iterator[Pool]:
    found = Pool(redis_url)
    yield found
    found.close()


async def until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, "it never came true"
        await asyncio.sleep(0.02)
