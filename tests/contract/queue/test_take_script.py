"""`take`: budgets, leases, suspects, retirement, dead letters, and what it makes of a Redis that forgot."""

import asyncio
from typing import Any

import pytest

INCARNATION = "00000000000000aa"


async def submit_all(bench: Any, count: int, **options: Any) -> None:
    for number in range(count):
        state, *_ = await bench.submit(f"r.0.{number}", **options)
        assert state == "accepted"


async def test_entries_come_in_order_and_exactly_once(bench: Any) -> None:
    await submit_all(bench, 5)
    first = await bench.take("one", budget=250)
    second = await bench.take("two", budget=10_000)
    assert [item["rollout_id"] for item in first + second] == [f"r.0.{number}" for number in range(5)]
    assert [len(first), len(second)] == [2, 3]
    assert bench.num_pending() == 5
    assert await bench.take("three") == []


async def test_a_delivery_says_all_about_itself(bench: Any) -> None:
    _, entry_id, _ = await bench.submit("r.0.0", tokens=70, timeout_ms=5000, attempt=3)
    (item,) = await bench.take()
    assert 0 <= item["age_ms"] < 2000
    assert item["remaining_ms"] == 5000 - item["age_ms"]
    assert {name: item[name] for name in ("tenant", "id", "rollout_id", "tokens", "count", "attempt")} == {
        "tenant": "math",
        "id": entry_id,
        "rollout_id": "r.0.0",
        "tokens": 70,
        "count": 1,
        "attempt": 3,
    }


async def test_the_number_of_entries_is_bounded(bench: Any) -> None:
    await submit_all(bench, 5, tokens=1)
    assert len(await bench.take(max_entries=3)) == 3
    assert len(await bench.take(max_entries=3)) == 2


async def test_an_entry_above_the_budget_comes_alone(bench: Any) -> None:
    await bench.submit("r.0.0", tokens=10)
    await bench.submit("r.0.1", tokens=5000)
    await bench.submit("r.0.2", tokens=10)
    taken = [[item["rollout_id"] for item in await bench.take(budget=100)] for _ in range(3)]
    assert taken == [["r.0.0"], ["r.0.1"], ["r.0.2"]]


async def test_a_lapsed_lease_comes_alone_and_counted(bench: Any) -> None:
    await submit_all(bench, 3)
    await bench.take("one")
    await bench.submit("r.0.3")
    bench.lapse()
    assert [(item["rollout_id"], item["count"]) for item in await bench.take("two")] == [("r.0.0", 2)]
    assert bench.totals()["redelivered"] == 1


async def test_a_suspect_waits_for_a_replica_that_holds_nothing(bench: Any) -> None:
    await submit_all(bench, 2)
    await bench.take("one", max_entries=1)
    bench.lapse()
    assert await bench.take("two", held=1) == []
    assert bench.must_drain
    # Only one replica runs empty for it, the others go on.
    assert [item["rollout_id"] for item in await bench.take("three", held=1)] == ["r.0.1"]
    assert not bench.must_drain
    (suspect,) = await bench.take("two", held=0)
    assert (suspect["rollout_id"], suspect["count"]) == ("r.0.0", 2)
    assert not bench.redis.exists(bench.keys.drain)


async def test_innocent_neighbours_of_a_poison_request_are_not_dead_lettered(bench: Any) -> None:
    """The first entry takes down whoever scores it; all four were in one batch with it."""
    await submit_all(bench, 4)
    answered, num_crashes = [], 0
    for life in range(20):
        items = await bench.take(f"life{life}", lease_ms=60_000, max_deliveries=3)
        if any(item["rollout_id"] == "r.0.0" for item in items):
            num_crashes += 1
            bench.lapse()
            continue
        for item in items:
            assert await bench.complete(item, f"life{life}") == "done"
            answered.append(item["rollout_id"])
    assert num_crashes == 3
    assert sorted(answered) == ["r.0.1", "r.0.2", "r.0.3"]
    assert sorted(bench.announced()) == [
        ("r.0.0", "dead_letter"),
        ("r.0.1", "ok"),
        ("r.0.2", "ok"),
        ("r.0.3", "ok"),
    ]


async def test_a_dead_letter_keeps_its_body_and_frees_the_books(bench: Any) -> None:
    await bench.submit("r.0.0", body=b"poison")
    for life in range(2):
        assert len(await bench.take(f"life{life}", max_deliveries=2)) == 1
        bench.lapse()
    assert await bench.take("last", max_deliveries=2) == []
    body_key = bench.keys.body("math", "00000000000000aa", "r.0.0")
    assert (bench.redis.get(body_key), bench.redis.pttl(body_key)) == (b"poison", -1)
    ((_, letter),) = bench.redis.xrange(bench.keys.dead("math"))
    assert {name: letter[name] for name in (b"r", b"t", b"n", b"c")} == {
        b"r": b"r.0.0",
        b"t": b"100",
        b"n": b"2",
        b"c": b"life1",
    }
    assert bench.redis.smembers(bench.keys.dead_tenants) == {b"math"}
    assert bench.in_flight() == {}
    reply = bench.reply("r.0.0")
    assert reply.startswith(b"dead_letter\n\nrollout_id=r.0.0: put aside after 2 deliveries")
    assert bench.totals()["dead"] == 1


async def test_requeued_dead_letters_are_scored_even_without_their_trainer(bench: Any) -> None:
    await bench.submit("r.0.0", body=b"poison")
    await bench.take("one", max_deliveries=1)
    bench.lapse()
    await bench.take("two", max_deliveries=1)
    ((dead_id, _),) = bench.redis.xrange(bench.keys.dead("math"))
    bench.redis.delete(bench.keys.alive("math", "00000000000000aa"))
    entry_id = await bench.run("requeue", "math", dead_id, 60_000)
    assert not bench.redis.exists(bench.keys.dead("math"), bench.keys.dead_tenants)
    (item,) = await bench.take("three")
    assert (item["id"], item["count"]) == (entry_id.decode(), 1)
    assert await bench.complete(item, "three") == "done"
    assert bench.reply("r.0.0") == b"ok\n\nreply"
    assert await bench.run("requeue", "math", dead_id, 60_000) == b"gone"


async def test_a_dead_letter_that_was_submitted_again_is_not_put_back_beside_it(bench: Any) -> None:
    await bench.submit("r.0.0")
    await bench.take("one", max_deliveries=1)
    bench.lapse()
    await bench.take("two", max_deliveries=1)
    ((dead_id, _),) = bench.redis.xrange(bench.keys.dead("math"))
    bench.redis.delete(bench.keys.reply("math", "00000000000000aa", "r.0.0"))
    assert (await bench.submit("r.0.0"))[0] == "accepted"
    assert await bench.run("requeue", "math", dead_id, 60_000) == b"queued"
    assert bench.in_flight() == {"tokens": 100, "entries": 1}


async def test_requests_of_a_trainer_that_is_gone_are_dropped(bench: Any) -> None:
    other = "00000000000000bb"
    bench.beat(incarnation=other)
    await bench.submit("r.0.0")
    await bench.submit("r.0.0", incarnation=other)
    await bench.submit("r.0.1")
    bench.redis.delete(bench.keys.alive("math", "00000000000000aa"))
    (item,) = await bench.take()
    assert item["incarnation"] == other
    assert bench.in_flight() == {"tokens": 100, "entries": 1}
    assert bench.totals() == {"delivered": 1, "dropped": 2}
    assert not any(name.startswith(("body:math:00000000000000aa", "reply")) for name in bench.names())


async def test_leased_requests_of_a_trainer_that_is_gone_are_dropped_when_they_lapse(bench: Any) -> None:
    await submit_all(bench, 3)
    await bench.take()
    bench.redis.delete(bench.keys.alive("math", "00000000000000aa"))
    bench.lapse()
    assert await bench.take("two") == []
    assert bench.names() == {"ring", "counters"}


async def test_a_passed_deadline_is_answered(bench: Any) -> None:
    await bench.submit("r.0.0", timeout_ms=30)
    await bench.submit("r.0.1", timeout_ms=60_000)
    await asyncio.sleep(0.05)
    (item,) = await bench.take()
    assert item["rollout_id"] == "r.0.1"
    assert bench.announced() == [("r.0.0", "deadline_exceeded")]
    assert bench.reply("r.0.0").startswith(b"deadline_exceeded\n\ntimeout_ms=30: ")
    assert bench.in_flight() == {"tokens": 100, "entries": 1}
    assert bench.totals()["expired"] == 1


async def test_a_passed_deadline_ends_redeliveries(bench: Any) -> None:
    await bench.submit("r.0.0", timeout_ms=30)
    await bench.take("one")
    await asyncio.sleep(0.05)
    bench.lapse()
    assert await bench.take("two") == []
    assert bench.announced() == [("r.0.0", "deadline_exceeded")]


async def test_an_entry_deleted_while_leased_is_forgotten(bench: Any) -> None:
    _, entry_id, _ = await bench.submit("r.0.0")
    await bench.take("one")
    bench.redis.xdel(bench.keys.requests("math"), entry_id)
    bench.lapse()
    assert await bench.take("two") == []
    assert not bench.redis.exists(bench.keys.requests("math"))


async def test_after_a_flush_the_group_is_made_again(bench: Any) -> None:
    await submit_all(bench, 2)
    items = await bench.take("one", max_entries=1)
    bench.redis.flushall()
    assert await bench.take("one") == []
    assert await bench.complete(items[0], "one") == "not_ours"
    bench.beat()
    await submit_all(bench, 2)
    assert len(await bench.take("one")) == 2


async def test_a_destroyed_group_delivers_everything_again(bench: Any) -> None:
    await submit_all(bench, 2)
    await bench.take("one")
    bench.redis.xgroup_destroy(bench.keys.requests("math"), "pool")
    assert [item["rollout_id"] for item in await bench.take("two")] == ["r.0.0", "r.0.1"]


async def test_leasing_goes_on_when_memory_is_full(bench: Any) -> None:
    await submit_all(bench, 2)
    await bench.take("one", max_entries=1)
    bench.redis.config_set("maxmemory", 1)
    (item,) = await bench.take("one", held=1)
    assert item["rollout_id"] == "r.0.1"


async def test_a_full_replica_finds_nothing_when_memory_is_full(bench: Any) -> None:
    await submit_all(bench, 2)
    await bench.take("one", max_entries=1)
    bench.redis.config_set("maxmemory", 1)
    assert await bench.take("one", budget=0, held=1) == []


async def test_what_is_left_wakes_another_replica(bench: Any) -> None:
    await submit_all(bench, 3)
    bench.redis.delete(bench.keys.wake)
    await bench.take(max_entries=1)
    assert bench.redis.llen(bench.keys.wake) == 1
    await bench.take()
    assert bench.redis.llen(bench.keys.wake) == 0


@pytest.mark.parametrize("num_tenants", [300])
async def test_work_per_call_is_bounded_and_everybody_is_reached(bench: Any, num_tenants: int) -> None:
    for number in range(num_tenants):
        tenant = f"t{number:03d}"
        bench.beat(tenant)
        await bench.submit("r.0.0", tenant=tenant)
    served: list[str] = []
    for _ in range(10):
        served += [item["tenant"] for item in await bench.take(budget=10**6, max_entries=1000)]
    assert sorted(served) == [f"t{number:03d}" for number in range(num_tenants)]
    assert len(served) == len(set(served))


@pytest.mark.parametrize(
    "fields",
    [
        {"x": "1"},
        {"r": "r.1", "t": "10", "i": INCARNATION, "d": "60000"},
        {"r": "r.1", "t": "ten", "i": INCARNATION, "d": "60000", "a": "0"},
        {"r": "r.1", "t": "0", "i": INCARNATION, "d": "60000", "a": "0"},
        {"r": "r.1", "t": "-5", "i": INCARNATION, "d": "60000", "a": "0"},
        {"r": "r.1", "t": "1e9", "i": INCARNATION, "d": "60000", "a": "0"},
        {"r": "r.1", "t": "9" * 40, "i": INCARNATION, "d": "60000", "a": "0"},
        {"r": "r 1", "t": "10", "i": INCARNATION, "d": "60000", "a": "0"},
        {"r": b"\xff\xfe", "t": "10", "i": INCARNATION, "d": "60000", "a": "0"},
        {"r": "r.1", "t": "10", "i": "", "d": "nan", "a": "0"},
    ],
    ids=str,
)
async def test_an_entry_that_is_none_stops_nobody(bench: Any, fields: dict[str, Any]) -> None:
    bench.beat("code")
    bench.redis.xadd(bench.keys.requests("math"), fields)
    bench.redis.sadd(bench.keys.active, "math")
    await bench.submit("r.good", tenant="math")
    await bench.submit("r.other", tenant="code")
    assert {item["rollout_id"] for item in await bench.take()} == {"r.good", "r.other"}
    assert bench.totals()["malformed"] == 1 and bench.redis.xlen(bench.keys.requests("math")) == 1
