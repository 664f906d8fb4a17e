"""What does a request cost in CPU time, by its bytes? `python -m benchmarks.request_cost [--quick]`

A real client, Redis and replica with an engine that answers at once (`prepared_replica`): k = 16, float16, prompt to
response 1:7, one request to a batch, which is the dearest way and that of replicas with little to do. Counted are the
CPU times of the Redis process and of the replica process, user and system, from /proc, and the bytes that come into
Redis: each request and each reply once, which is what the student's link carries. Two sizes give
`fixed_ms + ms_per_kib * KiB`; a third says how straight the line is. Rounds take turns, and each figure is the median
of its rounds. `capacity` calculates with the result.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from redis import Redis

from benchmarks.pool_scaling import cpu_s, start
from benchmarks.prepared_replica import NUM_DISTINCT, make_exchanges
from benchmarks.report import say, show
from benchmarks.wire_traffic import TEACHER, TENANT
from opd.client import ScoreClient
from opd.queue.embedded import EmbeddedRedis

SMALL, MIDDLE, LARGE = 448, 1792, 3584
"""Response tokens; the line is through the outer two."""
BATCH_REQUESTS = 1
NUM_OPEN = 16
KIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one request of a size."""

    kib: float
    """Request and reply, as they come into Redis."""
    redis_ms: float
    replica_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Milliseconds of CPU: `fixed_ms + ms_per_kib * KiB`."""

    fixed_ms: float
    ms_per_kib: float

    def at(self, kib: float) -> float:
        """Of a request of so many KiB."""
        return self.fixed_ms + self.ms_per_kib * kib


def fit(small: tuple[float, float], large: tuple[float, float]) -> Line:
    """Through two points (KiB, ms); ValueError where their sizes are one."""
    if small[0] == large[0]:
        raise ValueError(f"kib={small[0]}: two sizes are needed for a line")
    slope = (large[1] - small[1]) / (large[0] - small[0])
    return Line(fixed_ms=small[1] - slope * small[0], ms_per_kib=slope)


def median_cost(rounds: Sequence[Cost]) -> Cost:
    """Field by field."""
    return Cost(**{name: statistics.median(getattr(found, name) for found in rounds) for name in asdict(rounds[0])})


def measure_round(server: EmbeddedRedis, num_response: int, num_requests: int) -> Cost:
    """A replica of its own, warmed up, then so many requests with NUM_OPEN open at once."""
    process = start("prepared_replica", server.url, num_response, BATCH_REQUESTS)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the replica did not start")
        return asyncio.run(_ask(server, process.pid, num_response, num_requests))
    finally:
        process.terminate()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


async def _ask(server: EmbeddedRedis, replica: int, num_response: int, num_requests: int) -> Cost:
    exchanges = make_exchanges(num_response)
    # Names that no round before has used: a known rollout is answered from what is kept.
    run = f"{num_response}x{os.urandom(4).hex()}"
    async with ScoreClient.connect(server.url, teacher=TEACHER, tenant=TENANT) as client:

        async def ask(step: int, numbers: range) -> None:
            for number in numbers:
                exchange = exchanges[number % NUM_DISTINCT]
                request = replace(exchange.request, rollout_id=f"{run}.{step}.{number}")
                reply = await client.score(request)
                sent, came = exchange.reply.scores.sampled_logprobs, reply.scores.sampled_logprobs
                assert sent is not None and came is not None
                np.testing.assert_allclose(came, sent, rtol=2**-10, atol=2**-20)

        async def ask_all(step: int, count: int) -> None:
            await asyncio.gather(*[ask(step, range(first, count, NUM_OPEN)) for first in range(NUM_OPEN)])

        await ask_all(0, 2 * NUM_OPEN)
        before = (_bytes_in(server.url), cpu_s([server.pid]), cpu_s([replica]))
        await ask_all(1, num_requests)
        after = (_bytes_in(server.url), cpu_s([server.pid]), cpu_s([replica]))
    num_bytes, redis_s, replica_s = (b - a for a, b in zip(before, after, strict=True))
    return Cost(
        kib=num_bytes / KIB / num_requests,
        redis_ms=1000 * redis_s / num_requests,
        replica_ms=1000 * replica_s / num_requests,
    )


def _bytes_in(url: str) -> int:
    with Redis.from_url(url) as redis:
        return int(redis.info("stats")["total_net_input_bytes"])


def measure(server: EmbeddedRedis, num_rounds: int, mib: float) -> None:
    """So many rounds of each size, each of about so many MiB."""
    rounds: dict[int, list[Cost]] = {size: [] for size in (SMALL, MIDDLE, LARGE)}
    for number in range(num_rounds):
        for size, found in rounds.items():
            # About 0.1 KiB a response token; by that every size has a similar share of the time.
            num_requests = max(round(mib * KIB / (0.1 * size)), NUM_OPEN)
            say(f"round {number + 1} of {num_rounds}: {num_requests} requests of {size} response tokens")
            found.append(measure_round(server, size, num_requests))
    costs = {size: median_cost(found) for size, found in rounds.items()}
    small, middle, large = costs[SMALL], costs[MIDDLE], costs[LARGE]
    redis = fit((small.kib, small.redis_ms), (large.kib, large.redis_ms))
    replica = fit((small.kib, small.replica_ms), (large.kib, large.replica_ms))
    rows: list[tuple[object, ...]] = [(size, cost.kib, cost.redis_ms, cost.replica_ms) for size, cost in costs.items()]
    rows.append(("line, middle", middle.kib, redis.at(middle.kib), replica.at(middle.kib)))
    with Redis.from_url(server.url) as raw:
        version = str(raw.info("server")["redis_version"])
    result = {
        "redis_fixed_ms": redis.fixed_ms,
        "redis_ms_per_kib": redis.ms_per_kib,
        "replica_fixed_ms": replica.fixed_ms,
        "replica_ms_per_kib": replica.ms_per_kib,
        "redis_line_over_measured_at_the_middle": redis.at(middle.kib) / middle.redis_ms,
        "replica_line_over_measured_at_the_middle": replica.at(middle.kib) / middle.replica_ms,
        "costs": {str(size): asdict(cost) for size, cost in costs.items()},
        "rounds": num_rounds,
        "redis_version": version,
        "cores": os.cpu_count(),
    }
    show(("response tokens", "KiB", "redis ms", "replica ms"), rows, result)


def main() -> None:
    """On a Redis of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--mib", type=float, default=64.0, help="of requests and replies in a round; default 64")
    parser.add_argument("--quick", action="store_true", help="one round of 4 MiB: a look, not a measurement")
    given = parser.parse_args()
    if given.rounds < 1 or not given.mib > 0:
        parser.error(f"rounds={given.rounds}, mib={given.mib:g}: give 1 round or more, and more than 0 MiB")
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as server:
        measure(server, *((1, 4.0) if given.quick else (given.rounds, given.mib)))


if __name__ == "__main__":
    main()
