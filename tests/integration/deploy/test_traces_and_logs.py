"""A rollout can be followed through real processes: by its trace, and by its id in JSON logs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from opd.queue.embedded import EmbeddedRedis
from tests.integration.deploy.collector import CollectedSpan, Collector
from tests.integration.deploy.conftest import Service, Services, wait_until, write_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NUM_ROLLOUTS = 16
SLACK_NS = 5_000_000
"""Redis tells the age of an entry in whole milliseconds."""
PARENTS = {
    "rollout": "",
    "sample": "rollout",
    "score": "rollout",
    "submit": "score",
    "serve": "score",
    "queue_wait": "serve",
    "intake": "serve",
    "batch_wait": "serve",
    "engine_pass": "serve",
    "reply": "serve",
}
OF_THE_TRAINER = {"rollout", "sample", "score", "submit"}
CLIENT = """
import asyncio, sys
import numpy as np
from opd.client import ScoreClient
from opd.errors import OpdError
from opd.tracing import TracingSettings, configure_tracing
from opd.types import ScoreRequest

async def main(url):
    async with ScoreClient.connect(url, teacher="post", tenant="by-grpc") as client:
        for index, tokens in enumerate(([5, 6], [10**6])):
            ids = np.array(tokens, np.int32)
            try:
                await client.score(ScoreRequest(rollout_id=f'odd"id".3.{index}', tenant="by-grpc", teacher="post",
                                                prompt_token_ids=ids, response_token_ids=ids))
            except OpdError as error:
                print(error.code)

close = configure_tracing(TracingSettings(enabled=True, endpoint=sys.argv[2]), service="client", instance="one")
asyncio.run(main(sys.argv[1]))
close()
"""


@dataclass(frozen=True)
class Told:
    """What all of it left behind."""

    spans: list[CollectedSpan]
    teacher: Service
    trainer: Service
    client: Service


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    folder = tmp_path_factory.mktemp("traced")
    services, collector = Services(folder), Collector()
    tracing = ("tracing.enabled=true", f"tracing.endpoint={collector.endpoint}")
    with EmbeddedRedis(folder / "redis") as redis:
        try:
            teacher = services.teacher("post", f"redis_url={redis.url}", "log_json=true", "log_requests=true", *tracing)
            prompts = write_prompts(folder / "prompts.jsonl")
            trainer = services.trainer(
                f'data.files=["{prompts}"]', f"teacher.url={redis.url}", "teacher.pool=post", "teacher.tenant=math",
                "steps=1", "log.as_json=true", "log.requests=true", *tracing,
            )  # fmt: skip
            assert trainer.process.wait(300) == 0, trainer.log
            url = f"grpc://127.0.0.1:{teacher.note['grpc_port']}"
            client = services.start("client", "-c", CLIENT, url, collector.endpoint)
            assert client.process.wait(60) == 0, client.log
            assert teacher.end() == 0
            yield Told(collector.spans, teacher, trainer, client)
        finally:
            services.close()
            collector.close()


def by_trace(spans: list[CollectedSpan]) -> dict[str, dict[str, CollectedSpan]]:
    found: dict[str, dict[str, CollectedSpan]] = {}
    for span in spans:
        trace = found.setdefault(span.trace_id, {})
        assert span.name not in trace, f"two spans {span.name} in one trace"
        trace[span.name] = span
    return found


def lines(service: Service) -> list[dict[str, Any]]:
    """Every line of a log is JSON."""
    return [json.loads(line) for line in service.log.splitlines()]


def test_each_rollout_is_one_trace_through_both_processes(told: Told) -> None:
    traces = [trace for trace in by_trace(told.spans).values() if "rollout" in trace]
    assert len(traces) == NUM_ROLLOUTS
    assert len({trace["rollout"].attributes["rollout"] for trace in traces}) == NUM_ROLLOUTS
    for trace in traces:
        assert trace.keys() == PARENTS.keys()
        for name, parent in PARENTS.items():
            span = trace[name]
            assert span.service == ("opd-trainer" if name in OF_THE_TRAINER else "opd-teacher")
            assert span.parent_id == (trace[parent].span_id if parent else "")
            if parent:
                assert trace[parent].start_ns <= span.start_ns + SLACK_NS
                # Whoever asked may have the answer before the teacher has heard that it was taken.
                assert span.end_ns <= trace[parent].end_ns + SLACK_NS or name == "serve", name
        starts = [trace[name].start_ns for name in ("queue_wait", "intake", "batch_wait", "engine_pass", "reply")]
        assert starts == sorted(starts)
        assert trace["engine_pass"].end_ns <= trace["reply"].start_ns + SLACK_NS
        assert trace["rollout"].attributes["policy_version"] == 0 and trace["serve"].attributes["tenant"] == "math"


def test_rollouts_that_shared_a_pass_say_so(told: Told) -> None:
    passes = [
        span for span in told.spans if span.name == "engine_pass" and "rollout" in by_trace(told.spans)[span.trace_id]
    ]
    sizes = {(span.start_ns, span.attributes["batch_requests"]) for span in passes}
    assert sum(size for _, size in sizes) == NUM_ROLLOUTS


def test_grpc_carries_the_same_context_and_a_refusal_marks_its_spans(told: Told) -> None:
    assert told.client.log.splitlines() == ["invalid_request"]
    traces = [trace for trace in by_trace(told.spans).values() if trace["score"].service == "client"]
    scored, refused = sorted(traces, key=len, reverse=True)
    assert scored.keys() == {"score", "serve", "intake", "batch_wait", "engine_pass", "reply"}
    assert scored["score"].parent_id == "" and scored["serve"].parent_id == scored["score"].span_id
    assert refused.keys() == {"score", "serve", "intake"}
    assert refused["serve"].error == refused["score"].error == "invalid_request"
    assert not any(span.error for span in scored.values())


def test_spans_hold_no_tokens_and_no_text(told: Told) -> None:
    names = {name for span in told.spans for name in span.attributes}
    assert names <= {
        "rollout", "tenant", "teacher", "policy_version", "response_tokens", "tokens", "attempt", "batch_requests",
        "batch_tokens", "waited_s",
    }  # fmt: skip
    assert not any(isinstance(value, list | bytes) for span in told.spans for value in span.attributes.values())


def test_a_rollout_is_followed_by_its_id_through_both_logs(told: Told) -> None:
    trainer, teacher = lines(told.trainer), lines(told.teacher)
    sent = [line for line in trainer if line["message"].startswith("sent rollout")]
    assert len(sent) == NUM_ROLLOUTS
    for line in sent:
        rollout, about = line["rollout"], {"tenant": "math", "policy_version": 0}
        of_trainer = [found for found in trainer if found.get("rollout") == rollout]
        of_teacher = [found for found in teacher if found.get("rollout") == rollout]
        assert [found["message"].split()[0] for found in of_trainer] == ["sent", "scored"]
        assert [found["message"].split()[0] for found in of_teacher] == ["scored"]
        for found in (*of_trainer, *of_teacher):
            assert {name: found[name] for name in about} == about
        assert of_teacher[0]["request"].endswith("/1") and of_teacher[0]["engine_ms"] > 0
        assert of_trainer[1]["replica"]
    assert len({line["request"] for line in teacher if "request" in line}) == NUM_ROLLOUTS + 2
    # What a person would see of the run stands in the same form.
    assert [line["level"] for line in trainer if line["message"].startswith("step 1/1")] == ["info"]


def test_quotes_in_an_id_break_no_line(told: Told) -> None:
    odd = [line for line in lines(told.teacher) if line.get("tenant") == "by-grpc"]
    assert [line["rollout"] for line in odd] == ['odd"id".3.0', 'odd"id".3.1']
    assert [line["policy_version"] for line in odd] == [3, 3]
    assert [line.get("code") for line in odd] == [None, "invalid_request"]


def test_a_collector_that_is_away_costs_seconds_at_the_end_and_nothing_else(services: Services) -> None:
    code = (
        "import time\nfrom opd import tracing\n"
        "close = tracing.configure_tracing(tracing.TracingSettings(enabled=True, endpoint='http://127.0.0.1:1/x'),"
        " service='s', instance='i')\n"
        "for _ in range(50): tracing.begin('a', parent=None).end()\n"
        "begun = time.monotonic()\nclose()\nassert time.monotonic() - begun < 8\nprint('ended')"
    )
    service = services.start("alone", "-c", code)
    assert wait_until(lambda: service.process.poll() is not None) and service.process.returncode == 0, service.log
    assert "ended" in service.log
