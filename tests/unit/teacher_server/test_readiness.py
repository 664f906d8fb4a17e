import asyncio

from services.teacher_server.readiness import Part, Readiness


async def test_every_reason_must_go_before_the_replica_is_ready() -> None:
    readiness, seen = Readiness(), []
    readiness.subscribe(seen.append)
    readiness.hold(Part.CANARY, "probe drifted")
    readiness.clear(Part.START)
    assert seen == [False] and readiness.describe() == "canary: probe drifted"
    readiness.clear(Part.CANARY)
    readiness.clear(Part.CANARY)
    assert seen == [False, True] and readiness.describe() == "ready"
    readiness.hold(Part.SHUTDOWN, "SIGTERM")
    assert seen == [False, True, False] and readiness.why_not_scoring() == "SIGTERM"


async def test_a_lost_queue_stops_readiness_but_not_scoring() -> None:
    readiness = Readiness()
    readiness.clear(Part.START)
    readiness.hold(Part.QUEUE, "Redis is gone")
    assert not readiness.is_ready and readiness.why_not_scoring() == ""
    await asyncio.wait_for(readiness.wait_until_scoring(), 1)


async def test_waiting_ends_when_scoring_may_begin_and_begins_again_when_it_may_not() -> None:
    readiness = Readiness()
    waiting = asyncio.create_task(readiness.wait_until_scoring())
    await asyncio.sleep(0)
    assert not waiting.done()
    readiness.clear(Part.START)
    await asyncio.wait_for(waiting, 1)
    readiness.hold(Part.ENGINE, "stalled")
    again = asyncio.create_task(readiness.wait_until_scoring())
    await asyncio.sleep(0)
    assert not again.done()
    again.cancel()
