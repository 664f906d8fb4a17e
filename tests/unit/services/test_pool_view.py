"""What people see of a pool."""

import io

import pytest
from rich.console import Console

from opd.queue.status import PoolStatus, ReplicaStatus, TenantStatus
from services.pool_view import SpeedGauge, render


def status(**changes: object) -> PoolStatus:
    values: dict[str, object] = {
        "pool": "qwen@00ff", "is_known": True, "backlog_tokens": 0, "backlog_entries": 0, "leased_entries": 0,
        "oldest_age_s": 0.0, "dead_letters": 0, "replicas": (), "totals": {}, "used_memory_bytes": 1,
        "max_memory_bytes": 0, "tenants": (),
    }  # fmt: skip
    return PoolStatus(**(values | changes))  # type: ignore[arg-type]


def drawn(state: PoolStatus, speed: float | None = None) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(render({"qwen": state}, {"qwen": speed}))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_speed_is_of_the_last_seconds() -> None:
    gauge = SpeedGauge()
    totals = [(0.0, 0), (1.0, 100), (2.0, 300), (20.0, 300), (22.0, 1300)]
    speeds = [gauge.update(status(totals={"completed_tokens": tokens}), at) for at, tokens in totals]
    assert speeds == [None, 100.0, 150.0, None, 500.0]


def test_a_redis_that_forgot_begins_anew() -> None:
    gauge = SpeedGauge()
    gauge.update(status(totals={"completed_tokens": 900}), 0.0)
    assert gauge.update(status(), 1.0) is None
    assert gauge.update(status(totals={"completed_tokens": 50}), 2.0) == 50.0


def test_replicas_and_tenants_are_told() -> None:
    tenant = TenantStatus(
        tenant="math", backlog_tokens=12_345, backlog_entries=6, leased_entries=2, oldest_age_s=75.0, dead_letters=1,
        weight=2.0, cap_tokens=None,
    )  # fmt: skip
    replica = ReplicaStatus(replica_id="r[1]", age_s=1.25, fingerprint="00ff" * 8, model="m", engine="transformers")
    text = drawn(
        status(backlog_tokens=12_345, backlog_entries=6, oldest_age_s=75.0, dead_letters=1, replicas=(replica,),
               tenants=(tenant,)), 1500.0,
    )  # fmt: skip
    for part in ("qwen -> qwen@00ff", "1 replica,", "12,345 tokens in 6 requests", "1,500 tokens/s", "1 min 15 s",
                 "1 dead letter", "r[1]", "00ff00ff00ff", "transformers", "1.2 s", "none"):  # fmt: skip
        assert part in text, (part, text)


@pytest.mark.parametrize(("entries", "told"), [(0, "no live replica\n"), (3, "no live replica: requests wait\n")])
def test_a_pool_at_zero(entries: int, told: str) -> None:
    assert told in drawn(status(backlog_entries=entries)).replace(" \n", "\n")


def test_a_name_that_nobody_ever_used_is_told_from_an_idle_pool() -> None:
    text = drawn(status(is_known=False))
    assert "qwen -> qwen@00ff   no such pool: nobody ever served or asked it; correct the name" in text
    assert "replica" not in text and "no such pool" not in drawn(status())
