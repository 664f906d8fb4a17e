"""Is the pool shared fairly? `python -m benchmarks.fair_share [--quick]`

A sleeping engine of a fixed rate behind the real handler, queue intake and Redis. A batch holds one round of eight
tenants' quanta. Four trials: eight saturated tenants of equal weight; three of weights 1:2:4; a light tenant that asks
for one rollout at a time, alone and beside seven saturated ones; and four equal tenants of which one comes directly
and one both ways. Shares are of tokens, as the engine did them, while every tenant has more waiting.
"""

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.report import say, show
from benchmarks.sleeping import TEACHER, VOCABULARY, SleepingEngine, serving
from opd.client import ScoreClient
from opd.queue.embedded import EmbeddedRedis
from opd.types import ScoreReply, ScoreRequest
from services.teacher_server.config import BatchingSettings, TeacherConfig
from services.teacher_server.scoring import TeacherScoring

NUM_TENANTS = 8
QUANTUM_TOKENS = 1_024
BATCH_TOKENS = NUM_TENANTS * QUANTUM_TOKENS
TOKENS_PER_S = 40_960
BATCH_S = BATCH_TOKENS / TOKENS_PER_S
ROUND_S = NUM_TENANTS * QUANTUM_TOKENS / TOKENS_PER_S
NUM_OPEN = 48
"""Rollouts that a saturated tenant has open: about four batches of tokens."""

Ask = Callable[[ScoreRequest], Awaitable[ScoreReply]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is measured."""

    num_rounds: int = 200
    """Quanta of a tenant of weight 1."""
    num_light: int = 60
    """Requests of the light tenant."""


class Trial:
    """A replica, its clients, and what is asked of it."""

    def __init__(self, url: str, scoring: TeacherScoring, engine: SleepingEngine) -> None:
        self._url = url
        self._scoring = scoring
        self._engine = engine
        self._numbers = itertools.count()
        self._random = random.Random(0)
        self._tasks: list[asyncio.Task[None]] = []
        self._clients: list[ScoreClient] = []

    async def by_queue(self, tenant: str) -> Ask:
        client = ScoreClient.connect(self._url, teacher=TEACHER, tenant=tenant)
        await client.open()
        self._clients.append(client)
        return client.score

    async def directly(self, tenant: str) -> Ask:
        return self._scoring.score

    def saturate(self, tenant: str, ask: Ask, num_open: int = NUM_OPEN) -> None:
        """Keeps so many rollouts of 256 to 1,024 tokens open."""
        self._tasks += [asyncio.create_task(self._ask_on(tenant, ask)) for _ in range(num_open)]

    async def shares(self, tenants: Mapping[str, float], num_rounds: int) -> dict[str, float]:
        """Tokens by tenant, divided by its weight, in so many rounds after the first ones."""
        wanted = num_rounds * QUANTUM_TOKENS * sum(tenants.values())
        await asyncio.sleep(3 * BATCH_S)
        first = len(self._engine.served)
        done, shown_at = 0, time.monotonic()
        while done < wanted:
            await asyncio.sleep(BATCH_S)
            done = sum(item.num_tokens for item in self._engine.served[first:])
            if time.monotonic() - shown_at > 5:
                shown_at = time.monotonic()
                say(f"  {done / wanted:4.0%} of {num_rounds} rounds")
        tokens = dict.fromkeys(tenants, 0)
        for item in self._engine.served[first:]:
            tokens[item.tenant] += item.num_tokens
        return {tenant: tokens[tenant] / weight for tenant, weight in tenants.items()}

    async def light_p95_s(self, ask: Ask, count: int) -> float:
        """Of single rollouts of 256 tokens with pauses of up to two batches between them."""
        times = []
        for _ in range(count):
            await asyncio.sleep(self._random.uniform(0, 2 * BATCH_S))
            started = time.monotonic()
            await ask(self._request("light", 256))
            times.append(time.monotonic() - started)
        return float(np.quantile(times, 0.95))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self._clients:
            await client.close()

    async def _ask_on(self, tenant: str, ask: Ask) -> None:
        while True:
            await ask(self._request(tenant, self._random.randint(256, 1_024)))

    def _request(self, tenant: str, num_tokens: int) -> ScoreRequest:
        ids = np.arange(num_tokens, dtype=np.int32) % VOCABULARY
        return ScoreRequest(
            rollout_id=f"fair.0.{next(self._numbers)}",
            tenant=tenant,
            teacher=TEACHER,
            prompt_token_ids=ids[:64],
            response_token_ids=ids[64:],
        )


@asynccontextmanager
async def trial(url: str, weights: Mapping[str, float] | None = None) -> AsyncIterator[Trial]:
    engine = SleepingEngine(TOKENS_PER_S)
    config = TeacherConfig(
        model="sleeping",
        teacher=TEACHER,
        replica=f"sleeper-{time.monotonic_ns()}",
        batching=BatchingSettings(max_batch_tokens=BATCH_TOKENS, quantum_tokens=QUANTUM_TOKENS),
    )
    async with serving(url, engine, config, weights) as scoring:
        found = Trial(url, scoring, engine)
        try:
            yield found
        finally:
            await found.close()


def jain_index(shares: Mapping[str, float]) -> float:
    """1 when all are equal, 1/n when one has everything."""
    values = np.array(list(shares.values()))
    return float(values.sum() ** 2 / (len(values) * (values**2).sum()))


def largest_error(shares: Mapping[str, float]) -> float:
    """Largest relative distance of a weighted share from their mean."""
    values = np.array(list(shares.values()))
    return float(np.abs(values / values.mean() - 1).max())


async def equal_shares(url: str, size: Size) -> dict[str, float]:
    names = {f"t{number}": 1.0 for number in range(NUM_TENANTS)}
    async with trial(url) as found:
        for name in names:
            found.saturate(name, await found.by_queue(name))
        return await found.shares(names, size.num_rounds)


async def weighted_shares(url: str, size: Size) -> dict[str, float]:
    weights = {"w1": 1.0, "w2": 2.0, "w4": 4.0}
    async with trial(url, weights) as found:
        for name in weights:
            found.saturate(name, await found.by_queue(name))
        return await found.shares(weights, size.num_rounds)


async def mixed_shares(url: str, size: Size) -> dict[str, float]:
    names = dict.fromkeys(("queue-1", "queue-2", "direct", "both"), 1.0)
    async with trial(url) as found:
        for name in ("queue-1", "queue-2"):
            found.saturate(name, await found.by_queue(name))
        found.saturate("direct", await found.directly("direct"))
        found.saturate("both", await found.by_queue("both"), NUM_OPEN // 2)
        found.saturate("both", await found.directly("both"), NUM_OPEN // 2)
        return await found.shares(names, size.num_rounds)


async def light_beside_seven(url: str, size: Size) -> tuple[float, float]:
    async with trial(url) as found:
        ask = await found.by_queue("light")
        alone_s = await found.light_p95_s(ask, size.num_light)
        for number in range(NUM_TENANTS - 1):
            name = f"heavy{number}"
            found.saturate(name, await found.by_queue(name))
        await asyncio.sleep(3 * BATCH_S)
        return alone_s, await found.light_p95_s(ask, size.num_light)


async def measure(url: str, size: Size) -> None:
    say(f"batch {BATCH_TOKENS} tokens, {BATCH_S:g} s; quantum {QUANTUM_TOKENS}; {TOKENS_PER_S} tokens/s")
    say("eight equal tenants")
    equal = jain_index(await equal_shares(url, size))
    say("weights 1:2:4")
    weight_error = largest_error(await weighted_shares(url, size))
    say("by queue, directly, and both")
    mixed = await mixed_shares(url, size)
    say("a light tenant alone, then beside seven")
    alone_s, light_s = await light_beside_seven(url, size)
    bound_s = alone_s + BATCH_S + ROUND_S
    rows = [
        ("Jain index, 8 equal tenants", equal, ">= 0.97", equal >= 0.97),
        ("largest error of shares 1:2:4", weight_error, "<= 0.05", weight_error <= 0.05),
        ("Jain index, queue and direct", jain_index(mixed), ">= 0.97", jain_index(mixed) >= 0.97),
        ("light p95 beside seven, s", light_s, f"<= {bound_s:.3f}", light_s <= bound_s),
        ("light p95 alone, s", alone_s, "", ""),
    ]
    result = {
        "jain_index": equal,
        "weight_error": weight_error,
        "mixed_jain_index": jain_index(mixed),
        "light_p95_s": light_s,
        "light_p95_bound_s": bound_s,
        "light_alone_p95_s": alone_s,
        "batch_tokens": BATCH_TOKENS,
        "quantum_tokens": QUANTUM_TOKENS,
        "tokens_per_s": TOKENS_PER_S,
        "num_rounds": size.num_rounds,
    }
    show(("what", "measured", "required", "met"), rows, result)


def main() -> None:
    """Runs all trials on a Redis of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fair_share", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds: a look, not a measurement")
    size = Size(num_rounds=20, num_light=15) if parser.parse_args().quick else Size()
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as redis:
        asyncio.run(measure(redis.url, size))


if __name__ == "__main__":
    main()
