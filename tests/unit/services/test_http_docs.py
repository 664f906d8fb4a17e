"""The pages that explain the HTTP routes come whole from the process itself, over real HTTP."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from opd.metrics import TeacherMetrics
from opd.queue.connection import QueueConnection
from services.teacher_server import pool
from services.teacher_server.config import HttpSettings
from services.teacher_server.gate import Gate
from services.teacher_server.http_api import create_app
from services.teacher_server.readiness import Readiness
from services.teacher_server.scoring import ScoringSlot
from services.teacher_server.tenant_registry import TenantRegistry
from services.teacher_server.tenants_file import add_tenant
from services.trainer.http_api import RunStatus, build_app


def teacher_app() -> FastAPI:
    return create_app(ScoringSlot(), Readiness(), TeacherMetrics(), HttpSettings())


def pool_app() -> FastAPI:
    return pool.build_app(pool.PoolWatch(QueueConnection("redis://127.0.0.1:1/0"), ["qwen"], cache_s=1.0))


def trainer_app() -> FastAPI:
    return build_app(RunStatus())


@contextmanager
def served(app: FastAPI) -> Iterator[httpx.Client]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", trust_env=False, timeout=20) as http:
        yield http
    server.should_exit = True
    thread.join(10)
    listener.close()


@pytest.mark.parametrize(
    ("make", "routes"),
    [
        (teacher_app, {"/healthz", "/readyz", "/metrics", "/v1/info", "/v1/score"}),
        (pool_app, {"/healthz", "/metrics", "/v1/pool"}),
        (trainer_app, {"/healthz", "/readyz", "/metrics", "/v1/run"}),
    ],
)
def test_the_page_and_all_it_loads_come_from_here(make: Callable[[], FastAPI], routes: set[str]) -> None:
    with served(make()) as http:
        page = http.get("/docs")
        assert page.status_code == 200 and "swagger-ui" in page.text
        named = re.findall(r"""(?:href|src)\s*=\s*["']([^"']+)["']|url:\s*'([^']+)'""", page.text)
        loaded = [first or second for first, second in named]
        assert len(loaded) >= 4 and all(path.startswith("/") and not path.startswith("//") for path in loaded)
        assert "http:" not in page.text and "https:" not in page.text.replace(str(http.base_url), "")
        for path in loaded:
            found = http.get(path)
            assert found.status_code == 200 and found.content, path
        assert len(http.get("/static-offline-docs/swagger-ui-bundle.js").content) > 500_000
        schema = http.get("/openapi.json").json()
        assert set(schema["paths"]) == routes
        assert all(call.get("description") for path in schema["paths"].values() for call in path.values())


def test_the_page_of_a_guarded_teacher_is_open_and_its_routes_ask_for_a_token(tmp_path: Path) -> None:
    path = tmp_path / "tenants.toml"
    add_tenant(path, "math", "x" * 40, weight=1.0, max_inflight_tokens=None, hidden_states=False)
    metrics = TeacherMetrics()
    gate = Gate(TenantRegistry(path, sound=metrics.tenants_file_sound))
    app = create_app(ScoringSlot(), Readiness(), metrics, HttpSettings(), gate)
    with served(app) as http:
        for open_path in ("/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css"):
            assert http.get(open_path).status_code == 200
        assert http.get("/v1/info").status_code == 401
        for closed in ("/static-offline-docs", "/docs/other", "/openapi.json/x", "/static-offline-docs-other/x"):
            assert http.get(closed).status_code == 401
        assert http.get("/static-offline-docs/../v1/info").status_code in (401, 404)
        assert http.get("/static-offline-docs/%2e%2e/core.py").status_code == 404
        schema = http.get("/openapi.json").json()
        assert schema["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
        assert {name for name, path in schema["paths"].items() for call in path.values() if call.get("security")} == {
            "/v1/info", "/v1/score",
        }  # fmt: skip
