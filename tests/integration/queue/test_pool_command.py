"""`opd pool ...` as commands against a real Redis, with a real dead letter; none of them loads torch."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from opd.errors import ConfigError
from opd.lifecycle import Shutdown
from opd.queue.keys import PoolKeys
from opd.queue.score_consumer import ScoreConsumer
from services.teacher_server.pool import PoolConfig, serve_pool
from tests.integration.queue.test_pool_service import Service, bury_one

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.timeout(240)


async def pool(url: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "services.cli", "pool", *arguments, "--redis-url", url]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, cwd=ROOT, timeout=100, check=False
    )


async def test_the_status_in_words_and_as_json(redis_url: str) -> None:
    consumer = await ScoreConsumer.connect(redis_url, pool="qwen", name="one")
    await consumer.announce(b"of another version", expiry_s=200.0)
    idle = await ScoreConsumer.connect(redis_url, pool="idle", name="gone")
    await idle.publish_info(b"handshake")
    await idle.close()
    found = await pool(redis_url, "status", "qwen", "idle", "nothere", "--once")
    assert found.returncode == 0, found.stderr
    assert "qwen   1 replica, backlog 0 tokens" in found.stdout
    assert "idle   0 replicas, backlog 0 tokens" in found.stdout and "no live replica" in found.stdout
    assert "nothere   no such pool" in found.stdout and "nothere   0 replicas" not in found.stdout
    states = json.loads((await pool(redis_url, "status", "qwen", "nothere", "--json")).stdout)["teachers"]
    assert (states["qwen"]["is_known"], states["nothere"]["is_known"]) == (True, False)
    (replica,) = states["qwen"]["replicas"]
    assert (replica["replica_id"], replica["fingerprint"]) == ("one", "")
    assert 0 <= replica["age_s"] < 190
    await consumer.close()


async def test_a_dead_letter_is_listed_shown_and_put_back(redis_url: str) -> None:
    await bury_one(redis_url)
    listed = await pool(redis_url, "dead", "list", "--teacher", "qwen")
    assert "1 dead letter in qwen" in listed.stdout
    (letter,) = json.loads((await pool(redis_url, "dead", "list", "--teacher", "qwen", "--json")).stdout)[
        "dead_letters"
    ]
    for part in ("math", letter["dead_id"], "r.0.0", "victim", "UTC"):
        assert part in listed.stdout
    shown = await pool(redis_url, "dead", "show", "math", letter["dead_id"], "--teacher", "qwen")
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["prompt_token_ids", "5", "9"] in lines and ["last_replica", "victim"] in lines
    put_back = await pool(redis_url, "dead", "requeue", "math", letter["dead_id"], "--teacher", "qwen")
    assert put_back.stdout.startswith("requeued as entry ")
    with Redis.from_url(redis_url) as redis:
        assert redis.xlen(PoolKeys("qwen").requests("math")) == 1
    again = await pool(redis_url, "dead", "requeue", "math", letter["dead_id"], "--teacher", "qwen")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1) and "not there" in again.stderr


async def test_a_password_goes_to_another_machine_only_where_the_network_is_trusted(
    make_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_redis(over_tcp=True)
    password, _, address = server.url.removeprefix("redis://:").partition("@")
    monkeypatch.setenv("OPD_REDIS_PASSWORD", password)
    # This machine too, and not known as such.
    url = f"redis://{address.replace('127.0.0.1', '127.1')}"
    refused = await pool(url, "dead", "list")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "clear text to 127.1" in refused.stderr and "--trust-network" in refused.stderr
    for command in (["dead", "list"], ["status", "--json"]):
        trusted = await pool(url, *command, "--trust-network")
        assert trusted.returncode == 0, trusted.stderr
    with pytest.raises(ConfigError, match="clear text"):
        await serve_pool(PoolConfig(teachers=("qwen",), redis_url=url, port=0), Shutdown())
    service = Service()
    config = PoolConfig(teachers=("qwen",), redis_url=url, port=0, trust_network=True)
    serving = asyncio.create_task(serve_pool(config, service.shutdown, service.port.set_result))
    assert (await service.get("/healthz")).json() == {"status": "ok"}
    service.shutdown.request("test")
    await serving


async def test_promoting_to_a_pool_nobody_knows_is_one_line(redis_url: str) -> None:
    found = await pool(redis_url, "promote", "qwen", "qwen@00ff")
    assert (found.returncode, found.stderr.count("\n")) == (1, 1)
    assert "teacher=qwen@00ff: no replica ever announced itself" in found.stderr


def test_serving_and_showing_a_pool_loads_no_torch() -> None:
    code = (
        "import sys, services.teacher_server.pool, services.pool_view\n"
        "heavy = {'torch', 'transformers', 'vllm'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=100)
