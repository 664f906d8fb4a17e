"""Hidden states and heads of real teacher processes: exact, over a real wire, through kill -9, and into a trainer."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd.client import ScoreClient
from opd.credentials import Credentials
from opd.errors import TeacherUnavailableError, UnsupportedError
from opd.ops import full_logprobs
from opd.types import ScoreReply, ScoreRequest
from services.teacher_server.tenants_file import add_tenant
from services.trainer.run_log import read_steps
from services.trainer.teacher_head import load_output_head
from tests.integration.teacher_server.conftest import ROOT, StartTeacher, TeacherProcess
from tests.unit.teacher_server.engines.test_model_loading import ARCHITECTURES
from tests.unit.teacher_server.tiny_teachers import (
    NUM_DEFINED_IDS,
    make_request,
    reference_logprobs,
    save_tiny_teacher,
    save_tokenizer,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ENABLED = ("hidden_states.enabled=true", "hidden_states.chunk_bytes=1024")
NUM_RESPONSE = 40


def wanting(seed: int) -> ScoreRequest:
    """Hidden states and, beside them, the teacher's own log-prob of every defined id."""
    plain = make_request(seed, num_prompt=10, num_response=NUM_RESPONSE, wants_hidden_states=True)
    everything = np.tile(np.arange(NUM_DEFINED_IDS, dtype=np.int32), (NUM_RESPONSE, 1))
    return replace(plain, candidate_token_ids=everything)


def client_of(port: int, **changes: Any) -> ScoreClient:
    return ScoreClient.connect(f"grpc://127.0.0.1:{port}", teacher="tiny", tenant="math", **changes)


def plain(folder: Path) -> Path:
    return save_tiny_teacher(folder)


def soft_capped(folder: Path) -> Path:
    torch.manual_seed(3)
    ARCHITECTURES["soft cap"]().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def scaled(folder: Path) -> Path:
    torch.manual_seed(3)
    ARCHITECTURES["multiplied"]().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("save", "dtype"),
    [(plain, "float32"), (plain, "bfloat16"), (soft_capped, "float32"), (soft_capped, "bfloat16"), (scaled, "float32")],
)
async def test_log_probs_rebuilt_from_the_wire_are_the_teachers_own(
    start_teacher: StartTeacher, tmp_path: Path, save: Callable[[Path], Path], dtype: str
) -> None:
    folder = save(tmp_path / "model")
    teacher = start_teacher(f"model={folder}", f"dtype={dtype}", *ENABLED)
    request = wanting(1)
    async with client_of((await asyncio.to_thread(teacher.wait_ready))["grpc_port"]) as client:
        reply = await client.score(request)
        file = await client.output_head(tmp_path / "heads")
    assert reply.scores.hidden_states is not None and reply.scores.candidate_logprobs is not None
    blocks = full_logprobs(
        torch.from_numpy(reply.scores.hidden_states), load_output_head(file), num_defined_ids=file.num_defined_ids
    )
    found = torch.cat(list(blocks)).numpy()
    assert np.abs(found - reply.scores.candidate_logprobs).max() <= 1e-5
    if dtype == "float32":
        assert np.abs(found - reference_logprobs(folder, request, NUM_DEFINED_IDS)).max() <= 1e-4


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


async def scored_all(client: ScoreClient, count: int, after: Callable[[int], Any]) -> list[ScoreReply]:
    """`after` is told how many are answered, whenever one is."""
    num_done = 0

    async def one(seed: int) -> ScoreReply:
        nonlocal num_done
        reply = await client.score(wanting(seed))
        num_done += 1
        after(num_done)
        return reply

    return list(await asyncio.gather(*(one(seed) for seed in range(count))))


async def test_a_teacher_killed_in_mid_stream_and_started_again_loses_nothing(
    start_teacher: StartTeacher, tmp_path: Path
) -> None:
    port = free_port()
    settings = (*ENABLED, f"grpc.port={port}", "batching.max_batch_tokens=200")
    first = start_teacher(*settings)
    await asyncio.to_thread(first.wait_ready)
    restarted: list[TeacherProcess] = []

    def kill_once(num_done: int) -> None:
        if num_done >= 10 and not restarted:
            first.process.kill()
            first.process.wait()
            restarted.append(start_teacher(*settings))

    async with client_of(port, patience_s=120) as client:
        replies = await scored_all(client, 60, kill_once)
        file = await client.output_head(tmp_path / "heads")
        assert client.stats.resubmitted > 0 and (client.stats.scored, client.stats.failed) == (60, 0)
    head = load_output_head(file)
    for seed, reply in enumerate(replies):
        assert reply.rollout_id == f"run.0.{seed}" and reply.scores.hidden_states is not None
        states = torch.from_numpy(reply.scores.hidden_states)
        found = torch.cat(list(full_logprobs(states, head, num_defined_ids=NUM_DEFINED_IDS))).numpy()
        assert np.abs(found - reply.scores.candidate_logprobs).max() <= 1e-5


async def test_a_teacher_that_stays_away_is_a_typed_error(start_teacher: StartTeacher, tmp_path: Path) -> None:
    teacher = start_teacher(*ENABLED)
    async with client_of((await asyncio.to_thread(teacher.wait_ready))["grpc_port"], patience_s=1.0) as client:
        await client.score(wanting(1))
        teacher.process.kill()
        with pytest.raises(TeacherUnavailableError, match="teacher at"):
            await client.score(wanting(2))
        with pytest.raises(TeacherUnavailableError, match="teacher at"):
            await client.output_head(tmp_path / "heads")


async def test_the_queue_never_carries_them(start_teacher: StartTeacher, redis_url: str, tmp_path: Path) -> None:
    teacher = start_teacher(*ENABLED, f"redis_url={redis_url}")
    await asyncio.to_thread(teacher.wait_ready)
    async with ScoreClient.connect(redis_url, teacher="tiny", tenant="math") as client:
        with pytest.raises(UnsupportedError, match="hidden states never go through the queue"):
            await client.score(wanting(1))
        with pytest.raises(UnsupportedError, match="output head: is not in the queue"):
            await client.output_head(tmp_path)
        assert client.stats.sent == 0
        assert (await client.score(make_request(1))).scores.hidden_states is None


def train(folder: Path, model: Path, port: int, **settings: object) -> subprocess.CompletedProcess[str]:
    """A trainer process; the student is another random model with the same tokenizer."""
    student = save_tiny_teacher(folder / "student", seed=9)
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"w{2 + i} w{3 + i}"}], "data_source": "t"} for i in range(16)]
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    for path in (student, model):
        (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}w2")
    overrides = {
        "student.model": student, "student.device": "cpu", "data.files": f'["{prompts}"]', "data.num_epochs": 100,
        "teacher.url": f"grpc://127.0.0.1:{port}", "teacher.pool": "tiny", "teacher.head_cache": folder / "heads",
        "teacher.patience_s": 60, "run_dir": folder / "run", "rollout.prompts_per_step": 8,
        "rollout.rollouts_per_prompt": 2, "rollout.max_prompt_tokens": 20, "rollout.max_response_tokens": 16,
        "objective.kind": "full_vocabulary", "objective.score_top_k": 6, "optim.lr": 1e-2, "checkpoint.every_steps": 0,
    }  # fmt: skip
    command = [f"{name}={value}" for name, value in (overrides | settings).items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "services.trainer", *command], cwd=ROOT, env=environment, text=True,
        capture_output=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_trainer_learns_from_the_whole_vocabulary(
    start_teacher: StartTeacher, tmp_path: Path, dtype: str
) -> None:
    model = save_tiny_teacher(tmp_path / "teacher", seed=2)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}w2")
    teacher = start_teacher(f"model={model}", f"dtype={dtype}", *ENABLED)
    port = (await asyncio.to_thread(teacher.wait_ready))["grpc_port"]
    done = await asyncio.to_thread(train, tmp_path, model, port, steps=12)
    assert done.returncode == 0, done.stderr
    steps = read_steps(tmp_path / "run")
    losses = [record["loss/objective"] for record in steps]
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3]), losses
    assert all(record["queue/rollouts_lost"] == 0 for record in steps)
    assert "distill/overlap_ratio" in steps[0]


async def test_a_trainer_is_told_at_once_that_the_teacher_does_not_serve_them(
    start_teacher: StartTeacher, tmp_path: Path
) -> None:
    model = save_tiny_teacher(tmp_path / "teacher", seed=2)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}w2")
    teacher = start_teacher(f"model={model}")
    port = (await asyncio.to_thread(teacher.wait_ready))["grpc_port"]
    done = await asyncio.to_thread(train, tmp_path, model, port, steps=1)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "teacher tiny (transformers) cannot supply hidden_states" in done.stderr.splitlines()[-1]


async def test_a_right_that_is_missing_is_found_out_before_anything_is_sampled(
    start_teacher: StartTeacher, tmp_path: Path
) -> None:
    """The head lies in the cache already, so that the right to it is never asked for."""
    model = save_tiny_teacher(tmp_path / "teacher", seed=2)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}w2")
    tenants, token = tmp_path / "tenants.toml", tmp_path / "token"
    token.write_text("t2")
    add_tenant(tenants, "math", "t1", weight=1.0, max_inflight_tokens=None, hidden_states=True)
    add_tenant(tenants, "code", "t2", weight=1.0, max_inflight_tokens=None, hidden_states=False)
    teacher = start_teacher(f"model={model}", f"tenants_file={tenants}", *ENABLED)
    port = (await asyncio.to_thread(teacher.wait_ready))["grpc_port"]
    async with client_of(port, credentials=Credentials(token="t1")) as client:
        await client.output_head(tmp_path / "heads")
    settings = {"steps": 1, "teacher.tenant": "code", "teacher.token_file": token}
    done = await asyncio.to_thread(train, tmp_path, model, port, **settings)
    assert done.returncode == 2, done.stderr
    assert "hidden states" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
