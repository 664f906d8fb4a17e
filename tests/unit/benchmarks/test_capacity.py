"""The arithmetic of capacity: by hand for one load, and how each need moves with what causes it."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.capacity import Costs, Load, capacity

ROOT = Path(__file__).parents[3]
COSTS = Costs(
    link_bytes_per_token=102.4, redis_bytes_per_token=200.0, redis_fixed_ms=0.5, redis_ms_per_kib=0.01,
    replica_fixed_ms=1.0, replica_ms_per_kib=0.02,
)  # fmt: skip
LOAD = Load(
    students=10, rollouts_per_step=100, prompt_tokens=100, response_tokens=900, step_s=50.0, peak=2.0,
    teacher_tokens_per_s=5000.0, gpus_per_replica=2, utilisation=0.5, redis_gib=1.0, redis_gbit_per_s=1.0,
    redis_utilisation=0.5,
)  # fmt: skip


def test_one_load_by_hand() -> None:
    need = capacity(LOAD, COSTS)
    # 10 students x 100 rollouts in 50 s, twice that at the peak.
    assert need.requests_per_s == pytest.approx(40)
    assert need.scored_tokens_per_s == pytest.approx(40_000)
    # A replica does 2,500 at half of its speed.
    assert (need.replicas, need.gpus) == (16, 32)
    # 90,000 response tokens of 102.4 bytes in 50 s: 9.216 MB.
    assert need.student_mbit_per_s == pytest.approx(1.474_56)
    # 36,000 response tokens/s of 200 bytes: 7.2 MB/s.
    assert need.redis_gbit_per_s == pytest.approx(0.0576)
    # A request and its reply are 90 KiB: 0.5 + 0.9 ms in Redis, 1 + 1.8 ms in the replica, 40 times a second.
    assert need.redis_cores == pytest.approx(0.056)
    assert need.replica_overhead_cores == pytest.approx(0.112)
    # Ten steps of 9,000 KiB.
    assert need.backlog_gib == pytest.approx(90_000 / 1024**2)
    assert (need.shards, need.shards_by) == (1, "memory")


@pytest.mark.parametrize(
    ("change", "by"),
    [({"redis_gib": 0.01}, "memory"), ({"redis_gbit_per_s": 0.01}, "network"), ({"redis_gib": 1e6}, "cpu")],
)
def test_what_is_shortest_asks_for_shards(change: dict[str, float], by: str) -> None:
    need = capacity(replace(LOAD, **change), COSTS)  # type: ignore[arg-type]
    assert need.shards_by == by
    assert need.shards >= 1
    assert (need.shards > 1) == (min(change.values()) < 1)


def test_commands_of_redis_can_be_what_is_shortest() -> None:
    many = replace(LOAD, response_tokens=10, students=10_000, redis_gib=100.0)
    need = capacity(many, COSTS)
    # 40,000 requests/s of 1 KiB cost 0.51 ms each: 20.4 cores, each to be half used.
    assert need.redis_cores == pytest.approx(20.4)
    assert (need.shards, need.shards_by) == (41, "cpu")


def test_the_network_is_not_planned_full_either() -> None:
    # 7.2 MB/s in and out: 28.8 Mbit/s in each direction.
    for gbit_per_s, shards in ((0.0577, 1), (0.0575, 2), (0.0289, 2), (0.0287, 3)):
        need = capacity(replace(LOAD, redis_gbit_per_s=gbit_per_s, redis_gib=100.0), COSTS)
        assert (need.shards, need.shards_by) == (shards, "network")


def test_longer_rollouts_cost_more_than_their_number() -> None:
    """The same tokens in a quarter of the requests: the fixed part is saved, the bytes are not."""
    short, long = LOAD, replace(LOAD, response_tokens=3600, prompt_tokens=400, rollouts_per_step=25)
    few, many = capacity(long, COSTS), capacity(short, COSTS)
    assert few.scored_tokens_per_s == pytest.approx(many.scored_tokens_per_s)
    # 10 requests/s of 360 KiB: 0.5 + 3.6 ms and 1 + 7.2 ms, beside 0.056 and 0.112 cores.
    assert few.redis_cores == pytest.approx(0.041)
    assert few.replica_overhead_cores == pytest.approx(0.082)


def test_twice_the_students_need_twice_of_everything() -> None:
    one, two = capacity(LOAD, COSTS), capacity(replace(LOAD, students=20), COSTS)
    assert two.replicas == 2 * one.replicas
    for name in ("requests_per_s", "redis_gbit_per_s", "redis_cores", "backlog_gib"):
        assert getattr(two, name) == pytest.approx(2 * getattr(one, name))
    assert two.student_mbit_per_s == one.student_mbit_per_s


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"redis_utilisation": 1.1}, "redis_utilisation=1.1: is a share"),
        ({"students": 0}, "students=0: give more than 0"),
        ({"utilisation": 1.5}, "utilisation=1.5: is a share"),
        ({"step_s": math.nan}, "step_s=nan: is not finite"),
        ({"peak": math.inf}, "peak=inf: is not finite"),
        ({"peak": -math.inf}, "peak=-inf: is not finite"),
        ({"teacher_tokens_per_s": 1e-320}, "teacher_tokens_per_s=1e-320: is out of all bounds; give 1e-12 to 1e+12"),
        ({"peak": 1e308}, "peak=1e+308: is out of all bounds"),
        ({"students": 10**400}, f"students=1{'0' * 39}: is out of all bounds"),
    ],
)
def test_a_value_that_cannot_be_is_named(change: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        capacity(replace(LOAD, **change))  # type: ignore[arg-type]


def test_no_values_within_the_bounds_leave_the_range_of_numbers() -> None:
    for most in (1, -1):
        # All that raises a need at its most and all that lowers it at its least, and the reverse.
        more, less = 10.0 ** (12 * most), 10.0 ** (-12 * most)
        share = min(less, 1.0)
        whole = int(max(more, 1.0))
        load = Load(
            students=whole, rollouts_per_step=whole, prompt_tokens=whole, response_tokens=whole, step_s=less,
            peak=more, teacher_tokens_per_s=less, gpus_per_replica=whole, utilisation=share, redis_gib=less,
            redis_gbit_per_s=less, redis_utilisation=share,
        )  # fmt: skip
        need = capacity(load, Costs(**dict.fromkeys(asdict(Costs()), more)))
        assert all(0 < value < math.inf for value in asdict(need).values() if not isinstance(value, str))


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.capacity", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100, check=False)


def test_the_command_prints_one_object_and_refuses_in_one_line() -> None:
    done = run("--students", "8", "--step-s", "60")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["load"]["students"] == 8
    assert found["replicas"] == capacity(Load(students=8, step_s=60.0)).replicas
    refused = run("--students=-1")
    assert refused.returncode == 2 and "students=-1" in refused.stderr and "Traceback" not in refused.stderr
    for option in ("--redis-fixed-ms=nan", "--redis-gib=inf", "--step-s=1e-320"):
        refused = run(option)
        assert (refused.returncode, refused.stdout) == (2, "")
        name, value = option[2:].split("=")
        assert f"error: {name.replace('-', '_')}={value}: is " in refused.stderr


def test_the_documentation_quotes_what_the_model_says() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    need, costs = capacity(Load()), Costs()
    for value in (
        f"{need.requests_per_s:,.0f} requests/s",
        f"{need.scored_tokens_per_s / 1e6:.1f} million tokens/s",
        f"{need.replicas} replicas",
        f"{need.student_mbit_per_s:.1f} Mbit/s",
        f"{need.redis_gbit_per_s:.1f} Gbit/s",
        f"{need.backlog_gib:.0f} GiB",
        f"{need.shards} shards",
        f"{need.redis_cores:.1f} cores, of all servers together",
        f"{need.replica_overhead_cores:.1f} cores, of all together",
        f"({costs.redis_fixed_ms:g} + {costs.redis_ms_per_kib:g} * KiB) ms",
        f"({costs.replica_fixed_ms:g} + {costs.replica_ms_per_kib:g} * KiB) ms",
    ):
        assert value in text, value


def test_costs_are_those_of_the_decision_on_bytes() -> None:
    text = (ROOT / "docs" / "decisions" / "0006-bytes-on-the-wire.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| 16 | **"))
    cells = [cell.strip(" *") for cell in row.split("|")[1:-1]]
    assert float(cells[1]) == Costs().link_bytes_per_token
    assert float(cells[3]) == Costs().redis_bytes_per_token
