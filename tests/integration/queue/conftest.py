"""Replicas as processes of their own, that can be killed."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
REPLICA = """
import asyncio, os, signal, sys
from opd.queue.score_consumer import LeaseRules, ScoreConsumer

async def main(url, name, delay_s, lease_ms):
    rules = LeaseRules(lease_ms=lease_ms, poll_s=0.05, max_deliveries=3)
    consumer = await ScoreConsumer.connect(url, pool="qwen", name=name, rules=rules)
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    while True:
        for delivery in await consumer.take(token_budget=500):
            if delivery.body == b"poison":
                os.kill(os.getpid(), signal.SIGKILL)
            await asyncio.sleep(delay_s)
            await consumer.renew(consumer.held)
            await consumer.complete(delivery, delivery.body[::-1])

asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])))
"""

StartReplica = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_replica() -> Iterator[StartReplica]:
    """`start_replica(url, "one", delay_s=0.01, lease_ms=300)`: answers every body with itself reversed."""
    running: list[subprocess.Popen[str]] = []

    def start(url: str, name: str, *, delay_s: float = 0.002, lease_ms: int = 400) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", REPLICA, url, name, str(delay_s), str(lease_ms)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
