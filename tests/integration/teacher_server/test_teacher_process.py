"""The teacher as a real process with a real, tiny model: start, serve, refuse, end."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from opd.client import ScoreClient
from opd.errors import TeacherUnavailableError
from opd.rpc.client import GrpcScoreClient
from opd.types import ScoreReply
from tests.integration.teacher_server.conftest import ROOT, StartTeacher
from tests.unit.teacher_server.tiny_teachers import (
    NUM_DEFINED_IDS,
    make_request,
    random_ids,
    reference_scores,
    save_tiny_teacher,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def many(count: int, **changes: object) -> list:  # type: ignore[type-arg]
    return [make_request(seed, num_prompt=40, num_response=80, **changes) for seed in range(count)]


async def test_it_starts_serves_exact_scores_and_ends_clean(start_teacher: StartTeacher, teacher_folder: Path) -> None:
    teacher = start_teacher("canary_interval_s=0.2")
    note = teacher.wait_ready()
    assert note["pid"] == teacher.process.pid
    assert teacher.get("/readyz").json() == {"status": "ready"} and teacher.get("/healthz").status_code == 200
    request = make_request(
        5,
        num_prompt=20,
        num_response=30,
        wants_entropy=True,
        score_top_k=5,
        candidate_token_ids=random_ids(np.random.default_rng(1), 30, 4),
    )
    async with GrpcScoreClient(f"127.0.0.1:{note['grpc_port']}") as client:
        assert (await client.info()).fingerprint == note["fingerprint"]
        reply = await client.score(request)
    expected = reference_scores(teacher_folder, request, NUM_DEFINED_IDS)
    for name in ("sampled_logprobs", "candidate_logprobs", "topk_token_ids", "topk_logprobs", "entropy"):
        np.testing.assert_allclose(getattr(reply.scores, name), getattr(expected, name), atol=1e-4, err_msg=name)
    metrics = teacher.get("/metrics").text
    for line in (
        'opd_teacher_tokens_total{tenant="math"} 50.0',
        "opd_teacher_ready 1.0",
        "opd_teacher_canary_sound 1.0",
    ):
        assert line in metrics
    assert teacher.end() == 0
    assert "clean end after SIGTERM: 1 scored, 0 handed back, 0 abandoned" in teacher.log
    assert "Traceback" not in teacher.log


async def test_sigterm_under_load_answers_what_was_taken_and_refuses_the_rest(start_teacher: StartTeacher) -> None:
    teacher = start_teacher("batching.max_batch_tokens=240", "batching.max_tenant_tokens=100000")
    note = teacher.wait_ready()
    async with GrpcScoreClient(f"127.0.0.1:{note['grpc_port']}") as client:
        calls = [asyncio.create_task(client.score(request)) for request in many(300)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        teacher.process.send_signal(signal.SIGTERM)
        found = await asyncio.gather(*calls, return_exceptions=True)
    kinds = {type(item) for item in found}
    assert ScoreReply in kinds and kinds <= {ScoreReply, TeacherUnavailableError}
    # A second signal would end it at once.
    assert await asyncio.to_thread(teacher.process.wait, 30) == 0 and "clean end" in teacher.log


def test_a_signal_while_loading_ends_it_at_once(start_teacher: StartTeacher) -> None:
    teacher = start_teacher()
    teacher.wait_for(lambda: "loading" in teacher.log)
    assert teacher.end(timeout_s=20) == 0
    assert "Traceback" not in teacher.log


def free_port() -> tuple[socket.socket, int]:
    held = socket.create_server(("127.0.0.1", 0))
    return held, int(held.getsockname()[1])


@pytest.mark.parametrize("listener", ["grpc", "http"])
def test_a_taken_port_is_one_line_before_anything_is_loaded(start_teacher: StartTeacher, listener: str) -> None:
    held, port = free_port()
    with held:
        teacher = start_teacher(f"{listener}.port={port}")
        assert teacher.process.wait(60) == 2
    (line,) = teacher.log.splitlines()
    assert re.fullmatch(rf"opd: {listener}\.port={port}: cannot listen on 127\.0\.0\.1.*or 0 for a free one", line)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=/no/such/folder", "opd: model=/no/such/folder: no such folder; give a folder of Hugging Face files"),
        ("grpc.prot=1", "opd: grpc.prot: no such key; did you mean port?"),
        ("redis_url=http://host", "opd: redis_url=http://host: must start with redis://"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(start_teacher: StartTeacher, override: str, message: str) -> None:
    teacher = start_teacher(override)
    assert teacher.process.wait(90) == 2
    assert teacher.log.splitlines()[-1].startswith(message) and "Traceback" not in teacher.log


def test_broken_weights_are_named(start_teacher: StartTeacher, tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    teacher = start_teacher(f"model={folder}", f"cache_folder={tmp_path / 'cache'}")
    assert teacher.process.wait(90) == 2
    assert f"opd: model={folder}: cannot be loaded" in teacher.log.splitlines()[-1]
    assert "Traceback" not in teacher.log


async def test_weights_of_nan_leave_it_alive_and_not_ready_with_the_reason(
    start_teacher: StartTeacher, tmp_path: Path
) -> None:
    folder = save_tiny_teacher(tmp_path / "nan", nan_head=True)
    teacher = start_teacher(f"model={folder}")
    teacher.wait_for(lambda: "not ready: canary" in teacher.log)
    found = re.search(r"gRPC port (\d+), HTTP port (\d+)", teacher.log)
    assert found is not None
    ready = teacher.get("/readyz", int(found[2]))
    assert ready.status_code == 503 and "NaN or infinite at 16 of 16 scored positions" in ready.json()["status"]
    assert teacher.get("/healthz", int(found[2])).status_code == 200
    async with GrpcScoreClient(f"127.0.0.1:{found[1]}") as client:
        with pytest.raises(TeacherUnavailableError, match="takes no requests"):
            await client.score(make_request(1))
    assert not teacher.ready_file.exists() and teacher.end() == 0


def test_no_orphan_stays_when_the_launcher_is_killed(teacher_folder: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen(sys.argv[1:], env={**os.environ, 'OPD_DIE_WITH_PARENT': str(os.getpid())})\n"
        "print(child.pid, flush=True)\ntime.sleep(300)"
    )
    command = [sys.executable, "-m", "services.teacher_server", f"model={teacher_folder}", "--ready-file", str(ready)]
    with (
        (tmp_path / "log.txt").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-c", code, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=log
        ) as launcher,
    ):
        assert launcher.stdout is not None
        child = int(launcher.stdout.readline())
        wait_until(ready.exists, 90)
        launcher.kill()
        launcher.wait(10)
        wait_until(lambda: not is_running(child), 30)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until(condition, timeout_s: float) -> None:  # type: ignore[no-untyped-def]
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


async def test_kill_9_of_one_of_two_replicas_loses_and_doubles_nothing(
    start_teacher: StartTeacher, redis_url: str
) -> None:
    settings = (f"redis_url={redis_url}", "batching.max_batch_tokens=240", "queue.lease_s=1")
    replicas = [start_teacher(*settings, f"replica=r{index}") for index in range(2)]
    for replica in replicas:
        await asyncio.to_thread(replica.wait_ready)
    requests = many(250)
    answered: list[str] = []
    async with ScoreClient.connect(redis_url, teacher="tiny", tenant="math") as client:

        async def score(request) -> ScoreReply:  # type: ignore[no-untyped-def]
            reply = await client.score(request)
            answered.append(reply.rollout_id)
            return reply

        calls = [asyncio.create_task(score(request)) for request in requests]
        while len(answered) < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        replicas[0].process.kill()
        replies = await asyncio.wait_for(asyncio.gather(*calls), 120)
        assert client.stats.duplicates == 0 and client.stats.scored == 250
    assert sorted(answered) == sorted(request.rollout_id for request in requests)
    by_replica = {name: sum(reply.replica == name for reply in replies) for name in ("r0", "r1")}
    assert by_replica["r1"] > 0 and sum(by_replica.values()) == 250
    assert await asyncio.to_thread(replicas[1].end) == 0


async def test_sigterm_of_a_queue_replica_hands_over_without_a_lease_running_out(
    start_teacher: StartTeacher, redis_url: str
) -> None:
    settings = (f"redis_url={redis_url}", "batching.max_batch_tokens=240", "queue.lease_s=60")
    replicas = [start_teacher(*settings, f"replica=r{index}") for index in range(2)]
    for replica in replicas:
        await asyncio.to_thread(replica.wait_ready)
    async with ScoreClient.connect(redis_url, teacher="tiny", tenant="math") as client:
        calls = [asyncio.create_task(client.score(request)) for request in many(200)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        assert await asyncio.to_thread(replicas[0].end) == 0
        replies = await asyncio.wait_for(asyncio.gather(*calls), 50)
    assert len(replies) == 200 and "clean end after SIGTERM" in replicas[0].log
    assert (await asyncio.to_thread(replicas[1].end)) == 0


def test_a_redis_that_is_not_there_is_one_line(start_teacher: StartTeacher) -> None:
    teacher = start_teacher("redis_url=redis://:secret@127.0.0.1:1/0")
    assert teacher.process.wait(90) == 1
    last = teacher.log.splitlines()[-1]
    assert last.startswith("opd: redis redis://:***@127.0.0.1:1/0: not reachable") and "secret" not in teacher.log
