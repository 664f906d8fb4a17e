import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from opd import errors
from opd.metrics import TeacherMetrics
from services.teacher_server.batcher import BatchLimits, FairBatcher
from services.teacher_server.canary import Canary
from services.teacher_server.config import HttpSettings
from services.teacher_server.guarded_engine import GuardedEngine
from services.teacher_server.http_api import HttpServer, create_app
from services.teacher_server.http_gate import STATUS
from services.teacher_server.readiness import Part, Readiness
from services.teacher_server.scoring import ScoringSlot, TeacherScoring
from tests.unit.teacher_server.fake_engine import FakeEngine


class Service:
    def __init__(self, executor: ThreadPoolExecutor, limits: BatchLimits) -> None:
        self.engine, self.readiness, self.metrics = FakeEngine(), Readiness(), TeacherMetrics()
        self.slot = ScoringSlot()
        self.scoring = TeacherScoring(
            GuardedEngine(self.engine, Canary(self.engine)),
            FairBatcher(limits),
            executor,
            readiness=self.readiness,
            metrics=self.metrics,
            replica="r1",
            linger_s=0.0,
        )
        settings = HttpSettings(max_body_bytes=2048)
        self.server = HttpServer(create_app(self.slot, self.readiness, self.metrics, settings), settings)

    def load(self) -> None:
        self.slot.fill(self.scoring)
        self.readiness.clear(Part.START)


@asynccontextmanager
async def serving(limits: BatchLimits | None = None) -> AsyncIterator[tuple[Service, httpx.AsyncClient]]:
    with ThreadPoolExecutor(1) as executor:
        service = Service(executor, limits or BatchLimits())
        port = service.server.bind()
        tasks = [asyncio.create_task(service.server.run()), asyncio.create_task(service.scoring.run())]
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                yield service, client
        finally:
            service.engine.gate.set()
            service.server.stop()
            await tasks[0]
            tasks[1].cancel()
            with suppress(asyncio.CancelledError):
                await tasks[1]


def body(**changes: Any) -> dict[str, Any]:
    return {"prompt_token_ids": [1, 2], "response_token_ids": [30, 40]} | changes


async def test_health_is_up_before_the_model_is_and_readiness_says_why_not() -> None:
    async with serving() as (service, client):
        assert (await client.get("/healthz")).status_code == 200
        waiting = await client.get("/readyz")
        assert (waiting.status_code, waiting.json()["status"]) == (503, "start: the model is being loaded")
        assert (await client.get("/v1/info")).status_code == 503
        assert (await client.post("/v1/score", json=body())).json()["error"]["code"] == "unavailable"
        service.load()
        assert (await client.get("/readyz")).json() == {"status": "ready"}
        service.readiness.hold(Part.CANARY, "probe drifted")
        assert (await client.get("/readyz")).json()["status"] == "canary: probe drifted"
        assert (await client.get("/healthz")).status_code == 200


async def test_a_standing_engine_asks_for_a_restart() -> None:
    async with serving() as (service, client):
        service.load()
        service.readiness.hold(Part.ENGINE, "a forward pass takes too long")
        assert (await client.get("/healthz")).status_code == 503


async def test_scores_are_plain_json() -> None:
    async with serving() as (service, client):
        service.load()
        answer = await client.post("/v1/score", json=body())
        assert answer.status_code == 200
        found = answer.json()
        assert found["scores"] == {"sampled_logprobs": [-3.0, -4.0]}
        assert (found["rollout_id"], found["teacher_fingerprint"], found["replica"]) == ("by-hand", "f" * 16, "r1")
        service.engine.shift = float("nan")
        assert (await client.post("/v1/score", json=body())).json()["scores"]["sampled_logprobs"] == [None, None]


async def test_the_handshake_and_metrics_are_readable() -> None:
    async with serving() as (service, client):
        service.load()
        await client.post("/v1/score", json=body())
        info = (await client.get("/v1/info")).json()
        assert info["teacher"] == "tiny" and "entropy" in info["capabilities"]
        metrics = await client.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert 'opd_teacher_tokens_total{tenant="by-hand"} 4.0' in metrics.text


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (body(response_token_ids=[30, 300]), 400, "response_token_ids[1]=300: ids are 0 to 89"),
        (body(response_token_ids=[1 << 40]), 400, "response_token_ids: is no rectangle of 32-bit ids"),
        (body(candidate_token_ids=[[1], [1, 2]]), 400, "candidate_token_ids: is no rectangle of 32-bit ids"),
        (body(candidate_token_ids=[[], []]), 400, "candidate_token_ids=shape (2, 0)"),
        (body(typo=1), 400, "typo: extra inputs are not permitted"),
        ({"prompt_token_ids": [1]}, 400, "response_token_ids: field required"),
        (body(teacher="other"), 404, "teacher='other': this replica serves 'tiny'"),
    ],
    ids=str,
)
async def test_a_bad_body_is_one_line_with_a_status(content: dict[str, Any], status: int, message: str) -> None:
    async with serving() as (service, client):
        service.load()
        answer = await client.post("/v1/score", json=content)
        assert answer.status_code == status and message in answer.json()["error"]["message"]
        assert service.engine.scored == []


async def test_bodies_are_bounded_before_they_are_read() -> None:
    async with serving() as (service, client):
        service.load()
        large = await client.post("/v1/score", json=body(prompt_token_ids=[1] * 2000))
        assert large.status_code == 400 and "a body of at most 2048 bytes" in large.json()["error"]["message"]

        async def endless() -> AsyncIterator[bytes]:
            yield b"{}"

        unsized = await client.post("/v1/score", content=endless())
        assert unsized.status_code == 400 and "content-length=absent" in unsized.json()["error"]["message"]


async def test_over_the_cap_comes_with_retry_after() -> None:
    async with serving(BatchLimits(max_tenant_tokens=5)) as (service, client):
        service.load()
        service.engine.gate.clear()
        first = asyncio.create_task(client.post("/v1/score", json=body()))
        async with asyncio.timeout(5):
            while not service.engine.scored:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        refused = await client.post("/v1/score", json=body())
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["retryable"] is True
        service.engine.gate.set()
        assert (await first).status_code == 200


async def test_a_taken_port_is_one_line() -> None:
    readiness = Readiness()
    settings = HttpSettings()
    first = HttpServer(create_app(ScoringSlot(), readiness, TeacherMetrics(), settings), settings)
    port = first.bind()
    taken = HttpSettings(port=port)
    second = HttpServer(create_app(ScoringSlot(), readiness, TeacherMetrics(), taken), taken)
    with pytest.raises(errors.ConfigError, match=rf"http\.port={port}: cannot listen on 127\.0\.0\.1"):
        second.bind()
    first.stop()
    second.stop()


def test_every_status_belongs_to_an_error_of_the_tree() -> None:
    for code in STATUS:
        assert errors.from_code(code, "m").code == code
