"""Keys that a tenant may write, turned into something else: its own work suffers, the pool goes on."""

import asyncio
from typing import Any


async def submit(bench: Any, rollout_id: str, tenant: str) -> None:
    bench.beat(tenant)
    await bench.submit(rollout_id, tenant=tenant, tokens=10)


async def test_a_stream_that_is_a_string_stops_nobody_else(bench: Any) -> None:
    await submit(bench, "a0", "aa")
    await submit(bench, "b0", "bb")
    bench.redis.delete(bench.keys.requests("aa"))
    bench.redis.set(bench.keys.requests("aa"), "x")
    assert [item["rollout_id"] for item in await bench.take()] == ["b0"]


async def test_tenants_come_back_to_a_set_that_was_broken(bench: Any) -> None:
    await submit(bench, "a0", "aa")
    bench.redis.set(bench.keys.active, "x")
    assert await bench.take() == []
    await submit(bench, "a1", "aa")
    assert [item["rollout_id"] for item in await bench.take()] == ["a0", "a1"]


async def test_announcements_that_cannot_be_made_stop_no_take(bench: Any) -> None:
    bench.beat("aa")
    await bench.submit("late", tenant="aa", tokens=10, timeout_ms=1)
    await submit(bench, "b0", "bb")
    (incarnation,) = {key.decode().rsplit(":", 1)[1] for key in bench.redis.keys("*alive:aa*")}
    bench.redis.set(bench.keys.replies("aa", incarnation), "x")
    await asyncio.sleep(0.05)
    assert [item["rollout_id"] for item in await bench.take()] == ["b0"]
    assert bench.redis.exists(bench.keys.reply("aa", incarnation, "late"))
