"""Rollouts of one prompt are taken together where that is fair: by look-ahead, within credit, nobody left behind."""

from collections.abc import Sequence
from typing import Any

import pytest


async def submit(bench: Any, prompts: str, *, tenant: str = "math", tokens: int = 10, first: int = 0) -> None:
    """One rollout for each letter, which is its prompt; `.` has none."""
    bench.beat(tenant)
    for number, letter in enumerate(prompts, first):
        prompt = "" if letter == "." else letter
        await bench.submit(f"{letter}{number}", tenant=tenant, tokens=tokens, prompt=prompt)


def names(items: Sequence[dict[str, Any]]) -> str:
    return " ".join(item["rollout_id"] for item in items)


async def test_siblings_follow_their_head_and_the_skipped_come_next(bench: Any) -> None:
    await submit(bench, "abcabca")
    assert names(await bench.take()) == "a0 a3 a6 b1 b4 c2 c5"


async def test_a_skipped_head_is_served_before_anything_else_later(bench: Any) -> None:
    await submit(bench, "abaa")
    assert names(await bench.take(budget=30)) == "a0 a2 a3"
    await submit(bench, "aab", first=4)
    assert names(await bench.take("two", budget=30)) == "b1 b6 a4"
    assert names(await bench.take("two", budget=30)) == "a5"
    assert await bench.take("two") == []


async def test_without_a_prompt_hash_order_is_kept(bench: Any) -> None:
    await submit(bench, ".a..a.")
    assert names(await bench.take()) == ".0 a1 a4 .2 .3 .5"


async def test_the_look_ahead_is_bounded(bench: Any) -> None:
    await submit(bench, "a" + "b" * 31 + "a" + "a")
    assert names(await bench.take(max_entries=3)) == "a0 a32 b1"


async def test_siblings_spend_their_tenants_credit_and_no_more(bench: Any) -> None:
    """Quantum 30: three of `aa`'s own, then the others' turn, however many siblings wait."""
    await submit(bench, "xyxxxx", tenant="aa")
    await submit(bench, "pqpqpq", tenant="bb")
    assert names(await bench.take(budget=60, quantum=30)) == "x0 x2 x3 p0 p2 p4"
    assert names(await bench.take(budget=60, quantum=30)) == "y1 x4 x5 q1 q3 q5"


async def test_a_sibling_too_large_for_credit_or_budget_is_passed_over(bench: Any) -> None:
    bench.beat()
    for name, tokens, prompt in (("h", 40, "a"), ("big", 70, "a"), ("s", 40, "a"), ("other", 20, "b")):
        await bench.submit(name, tokens=tokens, prompt=prompt)
    assert names(await bench.take(quantum=100, budget=90)) == "h s"
    assert names(await bench.take("two", quantum=100)) == "big other"


async def test_what_was_pulled_forward_is_delivered_once(bench: Any) -> None:
    await submit(bench, "abaa")
    (first, second) = await bench.take(max_entries=2)
    assert (first["rollout_id"], second["rollout_id"], second["count"]) == ("a0", "a2", 1)
    rest = await bench.take("two")
    assert names(rest) == "b1 a3"
    assert await bench.take("three") == []
    for item, consumer in ((first, "one"), (second, "one"), (rest[0], "two"), (rest[1], "two")):
        assert await bench.complete(item, consumer) == "done"
    assert bench.num_pending() == 0 and bench.in_flight() == {}


async def test_pulled_forward_and_handed_back_or_lapsed_it_comes_again(bench: Any) -> None:
    await submit(bench, "abaa")
    pulled = await bench.take(max_entries=2)
    await bench.hand_back(pulled[1:])
    again = await bench.take("two", max_entries=1)
    assert (names(again), again[0]["count"]) == ("a2", 1)
    bench.lapse()
    for expected in ("a0", "a2"):
        (suspect,) = await bench.take("three")
        assert (suspect["rollout_id"], suspect["count"]) == (expected, 2)
        await bench.complete(suspect, "three")
    assert names(await bench.take("three")) == "b1 a3"


async def test_siblings_of_a_trainer_that_is_gone_are_dropped_when_reached(bench: Any) -> None:
    other = "00000000000000bb"
    await bench.submit("mine", prompt="a")
    bench.beat(incarnation=other)
    await bench.submit("gone", prompt="a", incarnation=other)
    await bench.submit("late", prompt="a")
    bench.redis.delete(bench.keys.alive("math", other))
    assert names(await bench.take()) == "mine late"
    assert bench.totals()["dropped"] == 1


async def test_withdrawn_siblings_leave_no_gap(bench: Any) -> None:
    await submit(bench, "abab")
    await bench.take(max_entries=2)
    await bench.withdraw("a2", "b1")
    assert names(await bench.take("two")) == "b3"


async def test_a_requeued_dead_letter_keeps_its_prompt(bench: Any) -> None:
    await submit(bench, "a")
    await bench.take(max_deliveries=1)
    bench.lapse()
    assert await bench.take("two", max_deliveries=1) == []
    (letter,) = bench.redis.xrange(bench.keys.dead("math"))
    await bench.run("requeue", "math", letter[0].decode(), 60_000)
    ((_, fields),) = bench.redis.xrange(bench.keys.requests("math"))
    assert fields[b"p"] == b"a"


@pytest.mark.parametrize("num_rollouts", [1, 4])
async def test_shares_stay_by_tokens_whatever_is_pulled_forward(bench: Any, num_rollouts: int) -> None:
    """One tenant's rollouts are all siblings, the other's none: both get half."""
    await submit(bench, "a" * 60, tenant="many")
    await submit(bench, "." * 60, tenant="none")
    served = {"many": 0, "none": 0}
    for _ in range(12 // num_rollouts):
        for item in await bench.take(budget=10 * num_rollouts, quantum=10):
            served[item["tenant"]] += item["tokens"]
            await bench.complete(item)
    assert served["many"] == served["none"] == 60


async def test_an_entry_that_is_none_stops_nobody_by_naming_the_heads_prompt(bench: Any) -> None:
    """Written by a tenant past the scripts, into its own stream."""
    await submit(bench, "a")
    bench.redis.xadd(bench.keys.requests("math"), {"p": "a"})
    await submit(bench, "a", first=1)
    assert names(await bench.take()) == "a0 a1"
