"""`complete`, `renew` and `hand_back`: who may answer, what is left behind, and what a repeat does."""

from typing import Any


async def test_completing_leaves_the_reply_and_its_announcement_only(bench: Any) -> None:
    await bench.submit("r.0.0")
    (item,) = await bench.take()
    assert await bench.complete(item) == "done"
    kept = {"alive:math:00000000000000aa", "reply:math:00000000000000aa:r.0.0", "replies:math:00000000000000aa"}
    until_next_take = {"requests:math", "active", "ring", "deficits", "counters"}
    assert bench.names() == kept | until_next_take
    assert bench.reply("r.0.0") == b"ok\n\nreply"
    assert bench.announced() == [("r.0.0", "ok")]
    assert 0 < bench.redis.pttl(bench.keys.reply("math", "00000000000000aa", "r.0.0")) <= 60_000
    assert 0 < bench.redis.pttl(bench.keys.replies("math", "00000000000000aa")) <= 60_000
    assert bench.totals() == {"delivered": 1, "completed": 1, "completed_tokens": 100}
    assert await bench.take() == []
    assert bench.names() == kept | {"ring", "counters"}


async def test_completing_again_is_a_no_op(bench: Any) -> None:
    await bench.submit("r.0.0")
    (item,) = await bench.take()
    await bench.complete(item)
    assert await bench.complete(item, frame=b"ok\n\nother") == "not_ours"
    assert bench.reply("r.0.0") == b"ok\n\nreply"
    assert bench.announced() == [("r.0.0", "ok")]
    assert bench.totals()["completed"] == 1


async def test_an_error_is_announced_with_its_code(bench: Any) -> None:
    await bench.submit("r.0.0")
    (item,) = await bench.take()
    assert await bench.complete(item, status="non_finite", frame=b"non_finite\n\nNaN") == "done"
    assert bench.announced() == [("r.0.0", "non_finite")]
    assert bench.totals()["failed"] == 1


async def test_after_a_reclaim_the_late_one_changes_nothing(bench: Any) -> None:
    await bench.submit("r.0.0")
    (late,) = await bench.take("one")
    bench.lapse()
    (item,) = await bench.take("two")
    before = bench.names()
    assert await bench.complete(late, "one") == "not_ours"
    assert bench.names() == before
    assert bench.in_flight() == {"tokens": 100, "entries": 1}
    assert await bench.complete(item, "two") == "done"
    assert await bench.complete(late, "one") == "not_ours"
    assert bench.announced() == [("r.0.0", "ok")]


async def test_nobody_completes_what_was_never_taken(bench: Any) -> None:
    _, entry_id, _ = await bench.submit("r.0.0")
    item = {"tenant": "math", "id": entry_id, "incarnation": "00000000000000aa", "rollout_id": "r.0.0"}
    assert await bench.complete(item) == "not_ours"
    assert await bench.probe("r.0.0") == ["pending"]


async def test_an_entry_that_the_books_no_longer_name_answers_nothing(bench: Any) -> None:
    await bench.submit("r.0.0")
    (item,) = await bench.take()
    field = "00000000000000aa/r.0.0"
    bench.redis.hset(bench.keys.entry("math"), field, "99999999999999-0 100")
    assert await bench.complete(item) == "withdrawn"
    assert bench.reply("r.0.0") is None
    assert bench.redis.hget(bench.keys.entry("math"), field) == b"99999999999999-0 100"


async def test_for_a_trainer_that_is_gone_no_reply_is_kept(bench: Any) -> None:
    await bench.submit("r.0.0")
    (item,) = await bench.take()
    bench.redis.delete(bench.keys.alive("math", "00000000000000aa"))
    assert await bench.complete(item) == "dropped"
    assert bench.names() == {"requests:math", "active", "ring", "deficits", "counters"}
    assert bench.totals() == {"delivered": 1, "dropped": 1}


async def test_completing_goes_through_when_memory_is_full(bench: Any) -> None:
    await bench.submit("r.0.0", body=bytes(1000))
    (item,) = await bench.take()
    bench.redis.config_set("maxmemory", 1)
    assert await bench.complete(item) == "done"
    assert bench.reply("r.0.0") == b"ok\n\nreply"


async def test_a_renewed_lease_does_not_lapse_and_counts_no_delivery(bench: Any) -> None:
    await bench.submit("r.0.0")
    (item,) = await bench.take("one")
    bench.lapse()
    assert await bench.renew([item], "one") == [1]
    assert await bench.take("two") == []
    bench.lapse()
    (again,) = await bench.take("two")
    assert again["count"] == 2


async def test_a_lost_lease_cannot_be_renewed(bench: Any) -> None:
    await bench.submit("r.0.0")
    (item,) = await bench.take("one")
    bench.lapse()
    await bench.take("two")
    assert await bench.renew([item], "one") == [0]
    (record,) = bench.redis.xpending_range(bench.keys.requests("math"), "pool", "-", "+", 10)
    assert record["consumer"] == b"two"
    assert record["times_delivered"] == 2


async def test_renewing_after_everything_was_lost_says_so(bench: Any) -> None:
    await bench.submit("r.0.0")
    (item,) = await bench.take("one")
    bench.redis.flushall()
    assert await bench.renew([item], "one") == [0]
    assert bench.names() == set()


async def test_handed_back_entries_come_to_the_next_at_once_and_uncounted(bench: Any) -> None:
    for number in range(3):
        await bench.submit(f"r.0.{number}")
    items = await bench.take("one")
    assert await bench.hand_back(items, "one") == 3
    assert bench.redis.llen(bench.keys.wake) >= 1
    again = await bench.take("two")
    assert [item["rollout_id"] for item in again] == ["r.0.0", "r.0.1", "r.0.2"]
    assert [item["count"] for item in again] == [1, 1, 1]
    assert await bench.complete(items[0], "one") == "not_ours"
    assert await bench.complete(again[0], "two") == "done"


async def test_handing_back_a_suspect_keeps_it_a_suspect(bench: Any) -> None:
    await bench.submit("r.0.0")
    await bench.take("one")
    bench.lapse()
    (suspect,) = await bench.take("two")
    assert suspect["count"] == 2
    await bench.hand_back([suspect], "two")
    (again,) = await bench.take("three")
    assert again["count"] == 2


async def test_only_what_is_held_can_be_handed_back(bench: Any) -> None:
    await bench.submit("r.0.0")
    (item,) = await bench.take("one")
    assert await bench.hand_back([item], "two") == 0
    assert await bench.take("three") == []


async def test_a_lease_is_not_prolonged_for_what_nobody_waits_for(bench: Any) -> None:
    other = "00000000000000bb"
    bench.beat(incarnation=other)
    for name, incarnation in (("wanted", "00000000000000aa"), ("withdrawn", "00000000000000aa"), ("gone", other)):
        await bench.submit(name, incarnation=incarnation)
    items = await bench.take()
    await bench.withdraw("withdrawn")
    bench.redis.delete(bench.keys.alive("math", other))
    bench.lapse()
    assert await bench.renew(items) == [1, 0, 0]
    assert await bench.take("two", held=1) == []
    assert bench.num_pending() == 1 and bench.totals()["dropped"] == 1
