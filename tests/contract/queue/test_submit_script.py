"""`submit`, `probe` and `withdraw`: every answer, and every key afterwards."""

from typing import Any

import pytest

BASE = {"alive:math:00000000000000aa"}
BOOKS = {"requests:math", "entry:math", "inflight:math", "active"}
QUEUED = BASE | BOOKS | {"wake", "newcomers", "body:math:00000000000000aa:r.0.0"}


async def test_an_accepted_request_leaves_exactly_these_keys(bench: Any) -> None:
    state, entry_id, _ = await bench.submit("r.0.0", tokens=70, timeout_ms=5000, attempt=2, prompt="0a1b2c3d")
    assert state == "accepted"
    assert bench.names() == QUEUED
    (row,) = bench.redis.xrange(bench.keys.requests("math"))
    assert row[0].decode() == entry_id
    numbers = {b"t": b"70", b"d": b"5000", b"a": b"2"}
    assert row[1] == {b"r": b"r.0.0", b"i": b"00000000000000aa", b"p": b"0a1b2c3d", **numbers}
    assert bench.entry("r.0.0") == f"{entry_id} 70"
    assert bench.in_flight() == {"tokens": 70, "entries": 1}
    assert bench.redis.smembers(bench.keys.active) == {b"math"}
    body_key = bench.keys.body("math", "00000000000000aa", "r.0.0")
    assert bench.redis.get(body_key) == b"body"
    assert 60_000 < bench.redis.pttl(body_key) <= 65_000


async def test_submitting_again_changes_nothing(bench: Any) -> None:
    first = await bench.submit("r.0.0")
    assert await bench.submit("r.0.0", body=b"other") == ("pending", first[1], "")
    assert bench.in_flight() == {"tokens": 100, "entries": 1}
    assert bench.redis.xlen(bench.keys.requests("math")) == 1
    assert bench.redis.get(bench.keys.body("math", "00000000000000aa", "r.0.0")) == b"body"


async def test_a_leased_request_is_still_pending(bench: Any) -> None:
    await bench.submit("r.0.0")
    await bench.take()
    assert (await bench.submit("r.0.0"))[0] == "pending"
    assert await bench.probe("r.0.0") == ["pending"]


async def test_an_answered_request_is_replied_and_not_queued_again(bench: Any) -> None:
    await bench.submit("r.0.0")
    (item,) = await bench.take()
    await bench.complete(item)
    assert (await bench.submit("r.0.0"))[0] == "replied"
    assert await bench.probe("r.0.0") == ["replied"]
    assert bench.in_flight() == {}


async def test_without_a_heartbeat_nothing_is_done(bench: Any) -> None:
    bench.redis.flushall()
    assert (await bench.submit("r.0.0"))[0] == "unregistered"
    assert bench.names() == set()


async def test_another_incarnation_has_books_of_its_own(bench: Any) -> None:
    other = "00000000000000bb"
    bench.beat(incarnation=other)
    await bench.submit("r.0.0", body=b"old")
    (item,) = await bench.take()
    await bench.complete(item, frame=b"ok\n\nscores of the old sample")
    assert (await bench.submit("r.0.0", body=b"new", incarnation=other))[0] == "accepted"
    (again,) = await bench.take()
    assert again["incarnation"] == other
    assert bench.redis.get(bench.keys.body("math", other, "r.0.0")) == b"new"


@pytest.mark.parametrize("field", ["cap:math", "cap:*"])
async def test_the_cap_counts_tokens_in_flight(bench: Any, field: str) -> None:
    bench.redis.hset(bench.keys.limits, field, 250)
    assert (await bench.submit("r.0.0"))[0] == "accepted"
    assert (await bench.submit("r.0.1"))[0] == "accepted"
    before = bench.names()
    assert await bench.submit("r.0.2") == ("over_cap", "250", "200")
    assert bench.names() == before
    assert (await bench.submit("r.0.3", tokens=50))[0] == "accepted"
    (item, *_) = await bench.take()
    await bench.complete(item)
    assert (await bench.submit("r.0.2"))[0] == "accepted"


async def test_a_tenants_own_cap_goes_before_the_default(bench: Any) -> None:
    bench.redis.hset(bench.keys.limits, mapping={"cap:*": 10, "cap:math": 1000})
    assert (await bench.submit("r.0.0"))[0] == "accepted"
    bench.beat("code")
    assert (await bench.submit("r.0.0", tenant="code"))[0] == "over_cap"


async def test_above_the_memory_fraction_nothing_is_admitted(bench: Any) -> None:
    used = bench.redis.info("memory")["used_memory"]
    bench.redis.config_set("maxmemory", used * 2)
    before = bench.names()
    state, _, limit = await bench.submit("r.0.0", fraction=0.3)
    assert (state, int(limit)) == ("backpressure", used * 2)
    assert bench.names() == before
    assert (await bench.submit("r.0.0", fraction=0.95))[0] == "accepted"


async def test_the_body_itself_counts_towards_the_memory_fraction(bench: Any) -> None:
    # Beside this much, the buffers and copies of a small body in transit do not show.
    bench.redis.set("ballast", bytes(20 << 20))
    used = bench.redis.info("memory")["used_memory"]
    bench.redis.config_set("maxmemory", used * 2)
    assert (await bench.submit("r.0.0", body=bytes(used // 1000), fraction=0.7))[0] == "accepted"
    assert (await bench.submit("r.0.1", body=bytes(used // 2), fraction=0.7))[0] == "backpressure"


async def test_out_of_memory_is_backpressure_and_leaves_nothing_half_done(bench: Any) -> None:
    bench.redis.config_set("maxmemory", 1)
    before = bench.names()
    assert (await bench.submit("r.0.0", fraction=1e12))[0] == "backpressure"
    assert bench.names() == before


async def test_a_lost_body_is_stored_again(bench: Any) -> None:
    await bench.submit("r.0.0")
    bench.redis.delete(bench.keys.body("math", "00000000000000aa", "r.0.0"))
    assert await bench.probe("r.0.0") == ["absent"]
    assert (await bench.submit("r.0.0"))[0] == "pending"
    assert await bench.probe("r.0.0") == ["pending"]
    assert bench.in_flight() == {"tokens": 100, "entries": 1}


async def test_a_lost_entry_is_queued_again_and_counted_once(bench: Any) -> None:
    await bench.submit("r.0.0")
    bench.redis.delete(bench.keys.requests("math"))
    assert await bench.probe("r.0.0") == ["absent"]
    assert (await bench.submit("r.0.0"))[0] == "accepted"
    assert bench.in_flight() == {"tokens": 100, "entries": 1}


async def test_probe_answers_each_and_writes_nothing(bench: Any) -> None:
    await bench.submit("r.0.0")
    await bench.submit("r.0.1")
    (item, *_) = await bench.take(max_entries=1)
    await bench.complete(item)
    before = bench.names()
    assert await bench.probe("r.0.0", "r.0.1", "r.0.2") == ["replied", "pending", "absent"]
    assert bench.names() == before


async def test_withdrawing_frees_the_cap_at_once(bench: Any) -> None:
    await bench.submit("r.0.0")
    await bench.submit("r.0.1", tokens=30)
    assert await bench.withdraw("r.0.0", "r.9.9") == 1
    assert bench.in_flight() == {"tokens": 30, "entries": 1}
    assert await bench.probe("r.0.0") == ["absent"]
    assert [item["rollout_id"] for item in await bench.take()] == ["r.0.1"]


async def test_what_was_withdrawn_while_being_scored_leaves_no_reply(bench: Any) -> None:
    await bench.submit("r.0.0")
    (item,) = await bench.take()
    await bench.withdraw("r.0.0")
    assert await bench.complete(item) == "withdrawn"
    assert bench.announced() == []
    assert bench.num_pending() == 0
    assert bench.reply("r.0.0") is None


async def test_the_scorer_of_a_withdrawn_attempt_does_not_answer_the_next_one(bench: Any) -> None:
    await bench.submit("r.0.0")
    (old,) = await bench.take()
    await bench.withdraw("r.0.0")
    await bench.submit("r.0.0")
    assert await bench.complete(old) == "withdrawn"
    assert await bench.probe("r.0.0") == ["pending"]
    (new,) = await bench.take("two")
    assert await bench.complete(new, "two") == "done"
    assert bench.in_flight() == {}


async def test_submit_wakes_but_the_list_stays_short(bench: Any) -> None:
    for number in range(40):
        await bench.submit(f"r.0.{number}")
    assert bench.redis.llen(bench.keys.wake) == 16
