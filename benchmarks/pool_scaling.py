"""Does the pool grow with its replicas, and what does the queue cost? `python -m benchmarks.pool_scaling [--quick]`

Replicas are processes with a sleeping engine behind the real handler, queue intake and Redis; students are coroutines
in two processes. Three trials: 1, 2, 4 and 8 replicas of one rate; 8 replicas of ever higher rates, until less than
0.9 of what they could do is done; 64 students for a minute, every reply checked. CPU time is that of the Redis process
and the replica processes, user and system, read from /proc before and after: the sleeping engine needs none of it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from redis import Redis

from benchmarks.report import say, show
from benchmarks.sleeping import TEACHER
from opd.queue.embedded import EmbeddedRedis
from opd.queue.keys import PoolKeys

ROOT = Path(__file__).parents[1]
REQUEST_TOKENS = 512
BATCH_TOKENS = 4 * REQUEST_TOKENS
NUM_STUDENTS = 64
NUM_OPEN = 2
MIN_EFFICIENCY = 0.9
RAMP_UP_S = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How long is measured, and how fast the replicas are."""

    replica_requests_per_s: float = 8.0
    trial_s: float = 12.0
    long_s: float = 60.0
    num_rates: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """One trial's outcome."""

    requests_per_s: float
    redis_cpu_ms: float
    """Per request, as the next one."""
    replica_cpu_ms: float
    tally: dict[str, int]


def start(module: str, url: str, *arguments: object) -> "subprocess.Popen[str]":
    """A child that reads the URL, which may hold a password, from its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OPD_DIE_WITH_PARENT": str(os.getpid()), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(f"{url}\n")
    return process


@contextmanager
def replicas(url: str, count: int, requests_per_s: float) -> Iterator[list[int]]:
    """Yields their process ids."""
    rate = requests_per_s * REQUEST_TOKENS
    started = [
        start("sleeping_replica", url, f"r{time.monotonic_ns()}-{number}", rate, BATCH_TOKENS)
        for number in range(count)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a replica did not start")
        yield [process.pid for process in started]
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(30)
            assert process.stdout is not None
            process.stdout.close()


def cpu_s(pids: list[int]) -> float:
    """User and system time of these processes so far, children not counted."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def num_completed(url: str) -> int:
    with Redis.from_url(url) as redis:
        return int(redis.hget(PoolKeys(TEACHER).counters, "completed") or 0)


def load(server: EmbeddedRedis, pids: list[int], duration_s: float) -> Load:
    """Rate and CPU while every student has its rollouts open; the tally is of all, to the last reply."""
    half = NUM_STUDENTS // 2
    length_s = duration_s + 2 * RAMP_UP_S
    students = [start("students", server.url, first, half, NUM_OPEN, length_s) for first in (0, half)]
    before = num_completed(server.url)
    while num_completed(server.url) < before + NUM_STUDENTS:
        time.sleep(0.05)
    time.sleep(RAMP_UP_S)
    first, began_s = num_completed(server.url), time.monotonic()
    redis_s, replica_s = cpu_s([server.pid]), cpu_s(pids)
    time.sleep(max(duration_s - RAMP_UP_S, 1.0))
    count, took_s = num_completed(server.url) - first, time.monotonic() - began_s
    redis_s, replica_s = cpu_s([server.pid]) - redis_s, cpu_s(pids) - replica_s
    tallies = [last_line(process) for process in students]
    return Load(
        requests_per_s=count / took_s,
        redis_cpu_ms=1000 * redis_s / count,
        replica_cpu_ms=1000 * replica_s / count,
        tally={name: sum(tally[name] for tally in tallies) for name in tallies[0]},
    )


def last_line(process: "subprocess.Popen[str]") -> dict[str, int]:
    """Waits for the process to end."""
    assert process.stdout is not None
    with process.stdout as stdout:
        found: dict[str, int] = json.loads(stdout.read().splitlines()[-1])
    process.wait(30)
    return found


def measure_scaling(server: EmbeddedRedis, size: Size, rows: list[tuple[object, ...]]) -> float:
    """Rate with 8 replicas over 8 times the rate with one."""
    rates = {}
    for count in (1, 2, 4, 8):
        say(f"{count} replicas of {size.replica_requests_per_s:g} requests/s")
        with replicas(server.url, count, size.replica_requests_per_s) as pids:
            found = load(server, pids, size.trial_s)
        rates[count] = found.requests_per_s
        efficiency = found.requests_per_s / (count * rates[1])
        rows.append(row(count, count * size.replica_requests_per_s, found, efficiency))
    return rates[8] / (8 * rates[1])


def find_limit(server: EmbeddedRedis, size: Size, rows: list[tuple[object, ...]]) -> tuple[float, float | None]:
    """The highest rate done by 8 replicas at 0.9 of what they could do, and the rate at which it was less."""
    reached = 0.0
    for step in range(size.num_rates):
        per_replica = size.replica_requests_per_s * 2 ** (step / 2)
        could = 8 * per_replica
        say(f"8 replicas of {per_replica:.3g} requests/s")
        with replicas(server.url, 8, per_replica) as pids:
            found = load(server, pids, size.trial_s / 2)
        rows.append(row(8, could, found, found.requests_per_s / could))
        if found.requests_per_s < MIN_EFFICIENCY * could:
            return reached, could
        reached = found.requests_per_s
    return reached, None


def row(count: int, could: float, found: Load, efficiency: float) -> tuple[object, ...]:
    return count, could, found.requests_per_s, efficiency, found.redis_cpu_ms, found.replica_cpu_ms


def measure(server: EmbeddedRedis, size: Size) -> None:
    rows: list[tuple[object, ...]] = []
    efficiency_8 = measure_scaling(server, size, rows)
    reached, failed_at = find_limit(server, size, rows)
    say(f"{NUM_STUDENTS} students for {size.long_s:g} s")
    with replicas(server.url, 8, 2 * size.replica_requests_per_s) as pids:
        found = load(server, pids, size.long_s)
    rows.append(row(8, 16 * size.replica_requests_per_s, found, float("nan")))
    tally = found.tally
    cpu_ms = found.redis_cpu_ms + found.replica_cpu_ms
    lost = tally["sent"] - tally["answered"]
    for what, is_met in (
        (f"efficiency at 8: {efficiency_8:.3f}, required 0.9", efficiency_8 >= MIN_EFFICIENCY),
        (f"lost {lost}, duplicated {tally['duplicated']}, wrong {tally['wrong']}: required 0", lost == 0),
    ):
        say(f"{what}: {'met' if is_met else 'NOT MET'}")
    result = {
        "scaling_efficiency_8": efficiency_8,
        "cpu_ms_per_request": cpu_ms,
        "redis_cpu_ms_per_request": found.redis_cpu_ms,
        "replica_cpu_ms_per_request": found.replica_cpu_ms,
        "requests_per_s_at_0_9": reached,
        "requests_per_s_offered_below_0_9": failed_at,
        "students": NUM_STUDENTS,
        "requests": tally["sent"],
        "lost": lost,
        "duplicated": tally["duplicated"],
        "wrong": tally["wrong"],
        "tokens_per_request": REQUEST_TOKENS,
        "cores": os.cpu_count(),
    }
    header = ("replicas", "could do /s", "did /s", "of linear or possible", "redis ms/request", "replica ms/request")
    show(header, rows, result)


def main() -> None:
    """Runs all trials on a Redis of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pool_scaling", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short trials: a look, not a measurement")
    is_quick = parser.parse_args().quick
    size = Size(trial_s=4.0, long_s=6.0, num_rates=2) if is_quick else Size()
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as server:
        measure(server, size)


if __name__ == "__main__":
    main()
