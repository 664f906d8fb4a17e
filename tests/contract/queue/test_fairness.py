"""Deficit round robin: shares follow weights in tokens, not in requests, and nobody waits behind a hog."""

from collections import Counter
from typing import Any

import pytest


async def fill(bench: Any, tenant: str, sizes: list[int]) -> None:
    bench.beat(tenant)
    for number, tokens in enumerate(sizes):
        await bench.submit(f"r.0.{number}", tenant=tenant, tokens=tokens)


async def serve(bench: Any, num_takes: int, *, budget: int, quantum: int = 100) -> Counter[str]:
    """Takes and completes; returns tokens by tenant."""
    served: Counter[str] = Counter()
    for _ in range(num_takes):
        for item in await bench.take(budget=budget, quantum=quantum):
            served[item["tenant"]] += item["tokens"]
            await bench.complete(item)
    return served


async def test_equal_weights_share_tokens_whatever_the_sizes(bench: Any) -> None:
    await fill(bench, "long", [400] * 50)
    await fill(bench, "short", [25] * 500)
    await fill(bench, "mixed", [10, 300, 90] * 50)
    served = await serve(bench, 20, budget=1200)
    assert sum(served.values()) > 20 * 700
    for tenant in ("long", "short", "mixed"):
        assert served[tenant] == pytest.approx(sum(served.values()) / 3, rel=0.06)


async def test_weights_set_the_shares(bench: Any) -> None:
    bench.redis.hset(bench.keys.limits, mapping={"weight:gold": 3, "weight:iron": 0.5})
    for tenant in ("gold", "iron", "plain"):
        await fill(bench, tenant, [50] * 400)
    served = await serve(bench, 30, budget=900)
    total = sum(served.values())
    assert served["gold"] / total == pytest.approx(3 / 4.5, rel=0.05)
    assert served["plain"] / total == pytest.approx(1 / 4.5, rel=0.05)
    assert served["iron"] / total == pytest.approx(0.5 / 4.5, rel=0.1)


async def test_rounds_go_on_where_a_full_budget_cut_them(bench: Any) -> None:
    """A budget below one round must not always end with the same tenant."""
    for tenant in ("aa", "bb", "cc", "dd"):
        await fill(bench, tenant, [100] * 40)
    served = await serve(bench, 40, budget=150)
    assert set(served.values()) == {1000}


async def test_a_newcomer_is_served_in_the_next_round(bench: Any) -> None:
    await fill(bench, "hog", [100] * 300)
    await serve(bench, 5, budget=500)
    await fill(bench, "small", [80])
    items = await bench.take(budget=500)
    assert "small" in {item["tenant"] for item in items}


async def test_idle_tenants_save_up_nothing(bench: Any) -> None:
    await fill(bench, "hog", [100] * 300)
    await fill(bench, "lazy", [100])
    await serve(bench, 10, budget=500)
    await fill(bench, "lazy", [100] * 100)
    served = await serve(bench, 10, budget=400)
    assert served["lazy"] == pytest.approx(served["hog"], abs=200)


async def test_what_an_emptied_tenant_was_granted_lapses(bench: Any) -> None:
    bench.redis.hset(bench.keys.limits, "weight:heavy", 50)
    await fill(bench, "heavy", [100])
    await fill(bench, "other", [100] * 20)
    await bench.take(budget=300)
    assert float(bench.redis.hget(bench.keys.deficits, "heavy")) == 0.0


async def test_entries_far_above_the_quantum_are_reached_without_many_rounds(bench: Any) -> None:
    await fill(bench, "whale", [1_000_000] * 3)
    await fill(bench, "other", [1_000_000] * 3)
    tenants = [(await bench.take(budget=10, quantum=1))[0]["tenant"] for _ in range(6)]
    assert sorted(tenants) == ["other"] * 3 + ["whale"] * 3
    assert await bench.take(budget=10) == []


async def test_dropped_requests_cost_their_tenant_nothing(bench: Any) -> None:
    await fill(bench, "gone", [100] * 20)
    await fill(bench, "here", [100] * 20)
    bench.redis.delete(bench.keys.alive("gone", "00000000000000aa"))
    served = await serve(bench, 4, budget=500)
    assert served == {"here": 2000}


async def test_a_full_replica_takes_one_small_request_of_whom_it_holds_nothing(bench: Any) -> None:
    await fill(bench, "hog", [100] * 5)
    held = await bench.take(budget=200)
    await fill(bench, "large", [101])
    await fill(bench, "small", [80, 80])
    assert [(item["tenant"], item["tokens"]) for item in await bench.take(budget=0, held=2)] == [("small", 80)]
    assert await bench.take(budget=0, held=3) == []
    # The second small one is not paid for: the first has spent the turn to come.
    assert [item["tenant"] for item in await bench.take("two", budget=0, held=1)] == ["hog"]
    assert len(held) == 2


async def test_a_newcomers_request_is_paid_for_by_its_next_turn(bench: Any) -> None:
    await fill(bench, "hog", [50] * 100)
    await fill(bench, "new", [50] * 100)
    served = {"hog": 0, "new": 0}
    for number in range(10):
        for item in await bench.take(f"full{number}", budget=0, held=1):
            served[item["tenant"]] += item["tokens"]
    served.update({tenant: served[tenant] + tokens for tenant, tokens in (await serve(bench, 8, budget=300)).items()})
    assert served["hog"] == pytest.approx(served["new"], abs=100)


async def test_a_full_replica_changes_nobodys_turn_and_wakes_nobody(bench: Any) -> None:
    for tenant in ("aa", "bb"):
        await fill(bench, tenant, [100] * 10)
    await bench.take(budget=100)
    ring = bench.redis.hgetall(bench.keys.ring)
    bench.redis.delete(bench.keys.wake)
    assert [item["tenant"] for item in await bench.take(budget=0, held=1)] == ["bb"]
    assert bench.redis.hgetall(bench.keys.ring) == ring and not bench.redis.exists(bench.keys.wake)


async def test_newcomers_are_told_once_and_only_when_they_come(bench: Any) -> None:
    await fill(bench, "math", [10, 10, 10])
    assert bench.redis.llen(bench.keys.newcomers) == 1
    for item in await bench.take():
        await bench.complete(item)
    assert not bench.redis.exists(bench.keys.newcomers)
    await bench.submit("again", tokens=10)
    assert bench.redis.llen(bench.keys.newcomers) == 1


@pytest.mark.parametrize("share", [0.25, 1.0])
async def test_what_came_directly_counts_against_the_share(bench: Any, share: float) -> None:
    """One tenant has `share` of what the pool gives beside the queue; both ways together it gets half."""
    await fill(bench, "both", [50] * 200)
    await fill(bench, "queue", [50] * 400)
    served = {"both": 0, "queue": 0}
    spent = 0
    for _ in range(40):
        given = await bench.take(budget=300, spent={"both": spent, "absent": 7})
        for item in given:
            served[item["tenant"]] += item["tokens"]
            await bench.complete(item)
        spent = int(share * 100)
        served["both"] += spent
    assert served["both"] == pytest.approx(served["queue"], abs=300)
    assert bench.redis.hget(bench.keys.deficits, "absent") is None


async def test_a_debt_is_bounded_and_bars_nobody_who_is_alone(bench: Any) -> None:
    await fill(bench, "math", [50] * 4)
    assert len(await bench.take(spent={"math": 10**9})) == 4
    await fill(bench, "other", [50] * 300)
    await bench.submit("late", tokens=50)
    await bench.take(budget=50, spent={"math": 10**9})
    assert float(bench.redis.hget(bench.keys.deficits, "math")) >= -64 * 100
