"""A rollout that could not even be sent: its root span and its line say so."""

import asyncio
from concurrent.futures import Future

import pytest

from opd.client import SyncScoreClient
from opd.errors import QueueUnavailableError
from opd.types import ScoreReply, ScoreRequest
from tests.observers import JsonLog, Traced
from tests.unit.trainer.test_batch import scored
from tests.unit.trainer.tiny_training import ExactClient, teacher_client


class ClosedLater(ExactClient):
    """Shakes hands, and then has requests carried by a real client that is closed."""

    def __init__(self) -> None:
        super().__init__(model=None)
        self.carrier = SyncScoreClient.connect("grpc://127.0.0.1:1", teacher="pool", tenant="tenant")
        self.carrier.close()

    def submit(self, request: ScoreRequest) -> Future[ScoreReply]:
        return self.carrier.submit(request)


def test_a_rollout_that_is_not_sent_ends_its_trace_with_the_error() -> None:
    traced, log = Traced(), JsonLog()
    try:
        client = teacher_client(ClosedLater(), score_top_k=2)
        client.shake_hands(wait_s=0)
        with log(), pytest.raises(QueueUnavailableError, match="is closed; make a new one"):
            client.send(scored("run.7.1", [1], [2]).rollout, scored("x", [1], [2]).rollout.prompt_token_ids)
        spans = traced.by_name()
    finally:
        traced.close()
    assert spans.keys() == {"rollout", "sample"}
    assert (spans["rollout"].error, spans["rollout"].parent_id) == ("queue_unavailable", "")
    assert spans["rollout"].attributes["rollout"] == "run.7.1"
    (line,) = log.matching("^rollout run.7.1 was not sent: ")
    assert (line["rollout"], line["tenant"], line["code"]) == ("run.7.1", "tenant", "queue_unavailable")


def test_one_that_is_sent_ends_it_with_its_reply() -> None:
    traced, log = Traced(), JsonLog()
    try:
        client = teacher_client(ExactClient(model=None), score_top_k=2)
        client.shake_hands(wait_s=0)
        with log():
            # This client has no model, which the future tells.
            future = client.send(scored("run.7.1", [1], [2]).rollout, scored("x", [1], [2]).rollout.prompt_token_ids)
        assert future.exception() is not None and not isinstance(future.exception(), asyncio.CancelledError)
        assert traced.by_name()["rollout"].error == type(future.exception()).__name__
    finally:
        traced.close()
    assert [line["message"].split(":")[0] for line in log.lines if "rollout" in line] == [
        "sent rollout run.7.1",
        "rollout run.7.1 was not scored",
    ]
