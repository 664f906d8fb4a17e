"""Replicas die, hang, leave, fall ill and are poisoned. All faults: docs/faults.md."""

import asyncio
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest

from opd.errors import DeadLetterError
from tests.integration.faults.conftest import (
    KEYS,
    ROOT,
    Pool,
    StartFragile,
    requests_of,
    student_of,
    until,
)
from tests.integration.faults.fragile_replica import POISON_ID


async def test_killed_in_mid_batch(redis_url: str, pool: Pool, start_fragile: StartFragile) -> None:
    """Equal samples of one prompt, some of them in the batch that dies."""
    victim = await start_fragile(redis_url, "victim", tokens_per_s=200).ready()
    async with student_of(redis_url) as student:
        student.ask(requests_of(40))
        await until(lambda: student.num_scored >= 4 and pool.held_by("victim") >= 4)
        victim.process.kill()
        assert pool.held_by("victim") >= 4
        start_fragile(redis_url, "other")
        replies = await student.check()
    assert {reply.replica[:6] for reply in replies} == {"victim", "other-"}
    assert student.num_resubmitted == 0 and pool.num_entries() == 0


async def test_sigterm_in_mid_batch_answers_it_and_hands_back_the_rest(
    redis_url: str, pool: Pool, start_fragile: StartFragile
) -> None:
    """No lease runs out: they last a minute."""
    leaving = await start_fragile(redis_url, "leaving", "queue.lease_s=60", tokens_per_s=100).ready()
    async with student_of(redis_url) as student:
        student.ask(requests_of(24))
        await until(lambda: student.num_scored >= 4 and pool.held_by("leaving") >= 8)
        leaving.send(signal.SIGTERM)
        assert await asyncio.to_thread(leaving.process.wait, 30) == 0
        assert pool.held_by("leaving") >= 1, "handed back: under its name until the next one takes it"
        start_fragile(redis_url, "staying", "queue.lease_s=60")
        await student.check()
    assert "clean end after SIGTERM" in leaving.log and " 0 abandoned" in leaving.log
    assert pool.total("redelivered") == 0


async def test_a_replica_that_hangs_past_its_lease_and_then_answers(
    redis_url: str, pool: Pool, start_fragile: StartFragile
) -> None:
    hanging = await start_fragile(redis_url, "hanging", tokens_per_s=100).ready()
    async with student_of(redis_url) as student:
        student.ask(requests_of(12))
        await until(lambda: pool.held_by("hanging") >= 4)
        hanging.send(signal.SIGSTOP)
        late = await start_fragile(redis_url, "other").ready()
        replies = await student.check()
        assert replies[0].replica.startswith("other") and pool.total("completed") == 12
        hanging.send(signal.SIGCONT)
        student.ask(requests_of(12, run="later"))
        await student.check()
        late.process.kill()
        # The one that hung is sound again and serves alone.
        student.ask(requests_of(4, run="last"))
        assert {reply.replica for reply in (await student.check())[-4:]} == {"hanging-0"}
    assert pool.total("completed") == 28 and pool.num_entries() == 0


async def test_a_long_batch_keeps_its_lease(redis_url: str, pool: Pool, start_fragile: StartFragile) -> None:
    """Four leases long, with an idle replica that would take what lapses."""
    await start_fragile(redis_url, "slow", "queue.lease_s=0.5", tokens_per_s=16 * 4 / 2).ready()
    async with student_of(redis_url) as student:
        student.ask(requests_of(4))
        await until(lambda: pool.held_by("slow") == 4)
        await start_fragile(redis_url, "idle", "queue.lease_s=0.5").ready()
        replies = await student.check()
    assert {reply.replica for reply in replies} == {"slow-0"}
    assert pool.total("redelivered") == 0


async def test_a_poison_request_ends_alone(redis_url: str, pool: Pool, start_fragile: StartFragile) -> None:
    """It ends two processes; its neighbours, one an equal sample of a sound prompt, are scored."""
    requests = requests_of(9)
    poison = replace(requests[8], rollout_id="run.0.poison", prompt_token_ids=np.array([POISON_ID], np.int32))
    async with student_of(redis_url) as student, student_of(redis_url, "code") as victim:
        student.ask(requests[:4])
        (ending,) = victim.ask([replace(poison, tenant="code")])
        student.ask(requests[4:])
        await until(lambda: pool.num_entries() + pool.num_entries("code") == 10)
        num_ended = 0
        while not ending.done():
            replica = await start_fragile(redis_url, f"life{num_ended}").ready()
            await until(lambda replica=replica: replica.process.poll() is not None or ending.done())  # type: ignore[misc]
            num_ended += replica.process.poll() == 9
        with pytest.raises(DeadLetterError, match=r"rollout_id=run.0.poison: put aside after 2 deliveries"):
            await ending
        await student.check()
    assert num_ended == 2 and pool.total("dead") == 1
    assert pool.redis.xlen(KEYS.dead("code")) == 1 and not pool.redis.exists(KEYS.dead("math"))


async def test_weights_that_turn_to_garbage(redis_url: str, pool: Pool, start_fragile: StartFragile) -> None:
    """In mid-run: not one wrong score, no dead letter, and the sick replica takes nothing more."""
    sick = await start_fragile(redis_url, "sick", tokens_per_s=200).ready()
    async with student_of(redis_url) as student:
        student.ask(requests_of(32))
        await until(lambda: student.num_scored >= 4)
        sick.send(signal.SIGUSR1)
        await until(lambda: "not ready: canary" in sick.log)
        start_fragile(redis_url, "sound")
        replies = await student.check()
        before = pool.total("delivered")
        student.ask(requests_of(8, run="later"))
        assert {reply.replica for reply in (await student.check())[-8:]} == {"sound-1"}
    assert {reply.replica for reply in replies} == {"sick-0", "sound-1"}
    assert pool.total("delivered") == before + 8 and pool.total("dead") == 0
    assert sick.process.poll() is None


TRAINER = """
import asyncio, sys
from tests.integration.faults.conftest import requests_of, student_of

async def main():
    async with student_of(sys.argv[1], "gone") as student:
        student.ask(requests_of(40, tenant="gone"))
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_trainer_that_is_gone_is_worked_for_no_longer(
    redis_url: str, pool: Pool, start_fragile: StartFragile
) -> None:
    """What waits in Redis is dropped, what waits in the replica is given up; its tokens are free again."""
    await start_fragile(redis_url, "only", tokens_per_s=16).ready()
    trainer = await asyncio.create_subprocess_exec(sys.executable, "-c", TRAINER, redis_url, cwd=ROOT)
    try:
        await until(lambda: pool.num_entries("gone") >= 32 and pool.held_by("only", "gone") >= 6)
    finally:
        trainer.kill()
        await trainer.wait()
    async with student_of(redis_url) as student:
        student.ask(requests_of(2))
        await student.check()
    await until(lambda: pool.num_entries("gone") == 0)
    # One request a second is scored, and its heartbeat outlives the trainer by four.
    assert pool.total("dropped") >= 16
    assert not pool.redis.exists(KEYS.inflight("gone"))
    # What was answered while it lived waits for it no longer than its time.
    assert all(pool.redis.pttl(key) > 0 for key in pool.redis.keys(KEYS.reply("gone", "*", "*")))
