"""What a request costs by its bytes: the line by hand, and the real measurement in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.request_cost import Cost, fit, median_cost

ROOT = Path(__file__).parents[3]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.request_cost", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False)


def test_a_line_through_two_points_by_hand() -> None:
    line = fit((40.0, 1.0), (240.0, 5.0))
    assert line.ms_per_kib == pytest.approx(0.02)
    assert line.fixed_ms == pytest.approx(0.2)
    assert line.at(100.0) == pytest.approx(2.2)
    with pytest.raises(ValueError, match=r"kib=40\.0: two sizes"):
        fit((40.0, 1.0), (40.0, 2.0))


def test_each_figure_is_the_median_of_its_own() -> None:
    rounds = [
        Cost(kib=1.0, redis_ms=9.0, replica_ms=2.0),
        Cost(kib=3.0, redis_ms=1.0, replica_ms=30.0),
        Cost(kib=2.0, redis_ms=4.0, replica_ms=3.0),
    ]
    assert median_cost(rounds) == Cost(kib=2.0, redis_ms=4.0, replica_ms=3.0)


def test_values_that_cannot_be_are_one_line() -> None:
    refused = run("--rounds", "0")
    assert refused.returncode == 2 and "rounds=0" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_queue_is_measured_with_processes_of_its_own() -> None:
    done = run("--quick")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    costs = found["costs"]
    # Bytes do not depend on the machine: about 92.4 of a response token (decision 0006), requests and replies.
    for size, cost in costs.items():
        assert cost["kib"] * 1024 / int(size) == pytest.approx(92.4, rel=0.05)
    # Eight times the bytes cost more, both sides, though far from eight times as much in Redis.
    assert costs["3584"]["replica_ms"] > costs["448"]["replica_ms"] > 0
    assert found["replica_ms_per_kib"] > 0
