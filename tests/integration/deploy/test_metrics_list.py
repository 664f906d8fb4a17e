"""The metrics list of docs/operations.md is what real processes expose: no name, type or label more or less."""

import asyncio
import re
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from opd.client import ScoreClient
from opd.types import ScoreRequest
from services.trainer.http_api import prometheus_name
from tests.integration.deploy.conftest import ROOT, Installation, Service, scrape
from tests.unit.deploy.monitoring import documented_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EVERYTHING = (
    "objective.tail=bucket",
    "objective.staleness_cap=5.0",
    "objective.outcome.weight=0.1",
    "objective.entropy_bonus=0.01",
    "objective.horizon.start=32",
    "objective.horizon.min_positions=1",
    "data.teacher_column=who",
    "teachers.post.pool=post",
    "teachers.big.pool=big",
    "teacher.encoding=float32",
)


Seen = dict[str, tuple[str, set[str]]]


def exposed(text: str) -> Seen:
    """Type and label names by metric, `_created` left out."""
    found: Seen = {}
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels)
    return found


def joined(parts: Iterator[Seen]) -> Seen:
    found: Seen = {}
    for part in parts:
        for name, (kind, labels) in part.items():
            found[name] = (kind, found.get(name, ("", set()))[1] | labels)
    return found


def documented(prefix: str) -> Seen:
    wanted = {name: found for name, found in documented_metrics().items() if name.startswith(prefix)}
    return {name: (kind, set(labels)) for name, (kind, labels) in wanted.items()}


def watched(trainer: Service) -> Iterator[Seen]:
    """What a run exposes from its start to its end."""
    port = int(trainer.wait_for(r"status on http://127\.0\.0\.1:(\d+)")[1])
    while trainer.process.poll() is None:
        try:
            yield exposed(scrape(port))
        except httpx.TransportError:
            break
        time.sleep(0.1)
    assert trainer.process.wait(60) == 0, trainer.log


async def ask(installation: Installation) -> None:
    """One request over the queue, so that a tenant has counters."""
    tokens = np.array([5, 6, 7], np.int32)
    request = ScoreRequest(
        rollout_id="r.0.0", tenant="math", teacher="post", prompt_token_ids=tokens, response_token_ids=tokens
    )
    async with ScoreClient.connect(installation.redis_url, teacher="post", tenant="math") as client:
        await client.score(request)


def test_teacher(installation: Installation) -> None:
    asyncio.run(ask(installation))
    assert exposed(scrape(installation.port("post"))) == documented("opd_teacher_")


def test_pool_status(installation: Installation) -> None:
    async def look_while_one_waits() -> Seen:
        # There is a backlog to tell of, because nobody serves this pool.
        tokens = np.array([5], np.int32)
        async with ScoreClient.connect(installation.redis_url, teacher="nobody", tenant="math") as client:
            request = ScoreRequest(
                rollout_id="r.0.0", tenant="math", teacher="nobody", prompt_token_ids=tokens, response_token_ids=tokens
            )
            waiting = asyncio.create_task(client.score(request))
            service, port = await asyncio.to_thread(installation.services.pool, installation.redis_url, "nobody")
            text = ""
            while "opd_pool_backlog_tokens{" not in text:
                await asyncio.sleep(0.1)
                text = await asyncio.to_thread(scrape, port)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            service.end()
            return exposed(text)

    assert asyncio.run(look_while_one_waits()) == documented("opd_pool_")


def test_trainer(installation: Installation) -> None:
    settings = (f'data.files=["{installation.prompts}"]', f"teacher.url={installation.redis_url}", "steps=3")
    seen = joined(watched(installation.services.trainer(*settings, *EVERYTHING)))
    wanted = documented("opd_trainer_")
    # Of runs whose rollouts vLLM samples; tests/contract/rollouts finds it there.
    del wanted["opd_trainer_rollout_engine_drift"]
    assert seen.keys() == wanted.keys()
    # An alarm's name is seen only when one is raised.
    assert {name: found for name, found in seen.items() if name != "opd_trainer_alarm"} == {
        name: found for name, found in wanted.items() if name != "opd_trainer_alarm"
    }


def test_names_are_those_of_the_diagnostics_list() -> None:
    text = (ROOT / "docs/diagnostics.md").read_text(encoding="utf-8")
    keys = set(re.findall(r"`((?:distill|loss|optim|outcome|rollout|timing)/\w+)`", text))
    arrays = {"distill/position_edges", "outcome/rewards_correct"}
    assert {prometheus_name(key) for key in keys - arrays} <= documented("opd_trainer_").keys()
