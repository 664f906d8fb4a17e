"""What the queue shell counts, logs and traces of the requests it answers, over a real Redis."""

import asyncio
from dataclasses import replace

import pytest
from redis import Redis

from opd.client import ScoreClient
from opd.errors import DeadlineExceededError, InternalError, InvalidRequestError, NonFiniteError, OpdError
from opd.queue.keys import GROUP, PoolKeys
from opd.queue.score_client import QueueScoreClient
from opd.types import ScoreReply
from opd.wire.messages import encode_request
from services.teacher_server.config import GrpcSettings
from tests.integration.teacher_server.test_queue_intake import Replica, client_of, named, replica
from tests.observers import PARENT, JsonLog, Traced, counted_errors, log, traced
from tests.unit.teacher_server.fake_engine import CRASH_ID, NAN_ID, until

__all__ = ["log", "traced"]


def counts(served: Replica) -> dict[str, int]:
    return counted_errors(served.metrics.render().decode())


async def score_raw(url: str, body: bytes, num_tokens: int = 8) -> None:
    client = await QueueScoreClient.connect(url, pool="tiny", tenant="math")
    try:
        await client.score(rollout_id="run.7.1", num_tokens=num_tokens, timeout_ms=5000, body=body)
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("token", "error", "code"),
    [(NAN_ID, NonFiniteError, "non_finite"), (CRASH_ID, InternalError, "internal"), (4000, InvalidRequestError, "")],
)
async def test_what_a_request_is_refused_with_counts_once(
    redis_url: str, token: int, error: type[OpdError], code: str
) -> None:
    async with replica(redis_url) as served, client_of(redis_url) as client:
        with pytest.raises(error):
            await client.score(named("a", token))
        await client.score(named("b"))
        await until(lambda: counts(served) == {code or "invalid_request": 1})


@pytest.mark.parametrize("body", [b"\xff\xff\xff", encode_request(named("another"))], ids=["junk", "other"])
async def test_a_body_that_cannot_be_read_counts_once(redis_url: str, log: JsonLog, body: bytes) -> None:
    async with replica(redis_url) as served:
        with pytest.raises(InvalidRequestError):
            await score_raw(redis_url, body)
        await until(lambda: counts(served) == {"invalid_request": 1})
    (line,) = log.matching("^refused run.7.1 of math: ")
    assert line["code"] == "invalid_request" and line["request"].endswith("/1")


async def test_a_body_above_the_limit_counts_once_although_nobody_fetches_it(redis_url: str, log: JsonLog) -> None:
    large = encode_request(named("run.7.1", num_response=9_000))
    async with replica(redis_url, grpc=GrpcSettings(max_message_bytes=2_000)) as served:
        with pytest.raises(InvalidRequestError, match=r"body of 79\d\d bytes is above the limit of 2000"):
            await score_raw(redis_url, large, num_tokens=9_001)
        await until(lambda: counts(served) == {"invalid_request": 1})
    assert len(log.matching("^refused run.7.1 of math: ")) == 1


async def test_a_fault_of_ours_counts_once_and_its_traceback_names_the_delivery(
    redis_url: str, log: JsonLog, traced: Traced
) -> None:
    async with replica(redis_url) as served, ScoreClient.connect(redis_url, teacher="tiny", tenant="math") as client:
        # An answer whose scores are none.
        served.engine._one = lambda request: object()  # type: ignore[method-assign, return-value, assignment]
        with pytest.raises(InternalError, match=r"^rollout run\.7\.1: a fault of the teacher's; its log"):
            await client.score(replace(named("run.7.1"), traceparent=PARENT))
        await until(lambda: counts(served) == {"internal": 1})
    (fault,) = log.matching("failed for a fault of ours$")
    (refused,) = log.matching("^refused ")
    assert "traceback" in fault and fault["request"] == refused["request"]
    for line in (fault, refused):
        assert (line["rollout"], line["tenant"], line["policy_version"]) == ("run.7.1", "math", 7)
    spans = {span.name: span for span in traced.spans()}
    assert spans["serve"].error == "internal" and "reply" not in spans


async def test_only_an_answer_with_scores_has_the_span_of_a_reply(redis_url: str, traced: Traced) -> None:
    async with replica(redis_url), client_of(redis_url) as client:
        await client.score(replace(named("good"), traceparent=PARENT))
        with pytest.raises(InvalidRequestError):
            await client.score(replace(named("bad", 4000), traceparent=PARENT))
    spans = traced.spans()
    served = {span.attributes["rollout"]: span for span in spans if span.name == "serve"}
    assert (served["good"].error, served["bad"].error) == ("", "invalid_request")
    assert [span.parent_id for span in spans if span.name == "reply"] == [served["good"].span_id]


async def test_what_is_handed_back_is_no_error_of_the_request(redis_url: str, log: JsonLog, traced: Traced) -> None:
    async with client_of(redis_url) as client:
        async with replica(redis_url, "first", max_batch_tokens=8) as first:
            first.engine.gate.clear()
            calls = [asyncio.create_task(client.score(replace(named(name), traceparent=PARENT))) for name in ("a", "b")]
            await until(lambda: first.scoring.num_in_flight == 2)
            await first.stop_taking()
            stopping = asyncio.create_task(first.intake.stop(5.0))
            await until(lambda: first.intake.num_handed_back == 1)
            first.engine.gate.set()
            await stopping
            assert counts(first) == {}
        (line,) = log.matching("^handed back b of math: ")
        assert line["code"] == "unavailable" and line["request"].endswith("/1")
        async with replica(redis_url, "second") as second:
            replies = await asyncio.gather(*calls)
            assert [reply.replica for reply in replies] == ["first", "second"]
            assert counts(second) == {}
    of_b = [span for span in traced.spans() if span.name == "serve" and span.attributes["rollout"] == "b"]
    assert sorted(span.error for span in of_b) == ["", "unavailable"]


async def test_what_somebody_else_took_over_is_told_and_not_counted(
    redis_url: str, log: JsonLog, traced: Traced
) -> None:
    """One request fails here and one would be handed back, after another replica has taken both."""
    async with client_of(redis_url) as client, replica(redis_url, "first", max_batch_tokens=8) as first:
        first.engine.gate.clear()
        asked = [replace(named(name, token), traceparent=PARENT) for name, token in (("a", NAN_ID), ("b", 5))]
        calls = [asyncio.create_task(client.score(request)) for request in asked]
        await until(lambda: first.scoring.num_in_flight == 2)
        await first.stop_taking()
        requests = PoolKeys(first.intake.pool).requests("math")
        with Redis.from_url(redis_url) as redis:
            entries = [item["message_id"] for item in redis.xpending_range(requests, GROUP, "-", "+", 10)]
            assert len(redis.xclaim(requests, GROUP, "other", 0, entries, justid=True)) == 2
        stopping = asyncio.create_task(first.intake.stop(5.0))
        await until(lambda: len(log.matching("^lost b of math: ")) == 1)
        first.engine.gate.set()
        await stopping
        assert counts(first) == {} and first.intake.num_handed_back == 0
        assert not any(call.done() for call in calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    told = {line["rollout"]: line["code"] for line in log.matching("^(lost|refused|handed back) ")}
    assert told == {"a": "non_finite", "b": "unavailable"} and len(log.matching("^lost ")) == 2
    assert {span.attributes["rollout"]: span.error for span in traced.spans() if span.name == "serve"} == told


async def test_a_deadline_that_passed_counts_once(redis_url: str) -> None:
    async with replica(redis_url) as served, client_of(redis_url) as client:
        served.engine.gate.clear()
        blocker = asyncio.create_task(client.score(named("a")))
        await until(lambda: len(served.engine.scored) > 0)
        with pytest.raises(DeadlineExceededError):
            await client.score(replace(named("b"), timeout_ms=200))
        await until(lambda: counts(served) == {"deadline_exceeded": 1})
        served.engine.gate.set()
        assert isinstance(await blocker, ScoreReply)
