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
