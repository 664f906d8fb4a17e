"""The engine's process and the trainer's, each ended by force: a typed error on one side, no orphan on the other."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from opd.errors import ConfigError, RolloutEngineError
from opd.types import Rollout
from services.trainer.rollout.base import SamplingParams
from services.trainer.rollout.vllm_process import VllmProcess
from tests.contract.engines.test_vllm_process import assert_none_is_left, marked_processes
from tests.contract.rollouts.conftest import bundled_model, open_stand, requests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[3]
LONG = SamplingParams(max_response_tokens=100)


def test_kill_9_of_the_engine_is_a_typed_error_and_leaves_nothing(mark: str, tmp_path: Path) -> None:
    with ExitStack() as opened:
        stand = open_stand(opened, tmp_path, bundled_model("student-base"), num_defined_ids=512)
        weights_folder = stand.folder.path
        assert marked_processes(mark) == {stand.process.pid}
        # What ends an orderly trainer is the trainer's to act on.
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(stand.process.pid, number)
        assert len(stand.engine.sample(requests(2), SamplingParams(max_response_tokens=4))) == 2

        def kill(rollout: Rollout) -> None:
            os.kill(stand.process.pid, signal.SIGKILL)

        with pytest.raises(RolloutEngineError, match=r"gone \(killed by SIGKILL\); .*engine\.log may say why"):
            stand.engine.sample(requests(12), LONG, on_finish=kill)
        # It stays gone, for whoever asks next.
        with pytest.raises(RolloutEngineError, match=r"is gone"):
            stand.weights.publish(1)
    assert_none_is_left(mark)
    assert not weights_folder.exists()


def test_an_engine_that_says_nothing_is_ended(mark: str, tmp_path: Path) -> None:
    with ExitStack() as opened:
        stand = open_stand(opened, tmp_path, bundled_model("student-base"), num_defined_ids=512)
        stand.process._patience_s = 3.0

        def freeze(rollout: Rollout) -> None:
            os.kill(stand.process.pid, signal.SIGSTOP)

        with pytest.raises(RolloutEngineError, match=r"no sign of life for 3 s, so it was ended"):
            stand.engine.sample(requests(12), LONG, on_finish=freeze)
        assert_none_is_left(mark)


TRAINER = """
import sys, threading
from contextlib import ExitStack
from pathlib import Path
from tests.contract.rollouts.conftest import bundled_model, open_stand, requests
from services.trainer.rollout.base import SamplingParams
with ExitStack() as opened:
    stand = open_stand(opened, Path(sys.argv[1]), bundled_model("student-base"), num_defined_ids=512)
    print(stand.folder.path, flush=True)
    while True:
        stand.engine.sample(requests(12), SamplingParams(max_response_tokens=100))
"""


def test_kill_9_of_the_trainer_ends_the_engine_and_its_files(mark: str, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", TRAINER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as trainer:
        try:
            assert trainer.stdout is not None
            weights_folder = Path(trainer.stdout.readline().strip())
            assert weights_folder.is_dir() and len(marked_processes(mark)) == 2
        finally:
            trainer.kill()
    assert_none_is_left(mark)
    assert not weights_folder.exists()


def test_closing_while_another_thread_samples_ends_both(mark: str, tmp_path: Path) -> None:
    failures: list[BaseException] = []
    with ExitStack() as opened:
        stand = open_stand(opened, tmp_path, bundled_model("student-base"), num_defined_ids=512)
        begun = threading.Event()

        def sample() -> None:
            try:
                while True:
                    stand.engine.sample(requests(12), LONG, on_finish=lambda _: begun.set())
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=sample)
        thread.start()
        assert begun.wait(60)
        ended = time.monotonic()
    thread.join(20)
    assert not thread.is_alive() and time.monotonic() - ended < 20
    assert [type(error) for error in failures] == [RolloutEngineError]
    assert_none_is_left(mark)


def test_a_model_that_cannot_be_loaded_is_one_line(mark: str, tmp_path: Path) -> None:
    process = VllmProcess(python=None, environment={}, log=tmp_path / "engine.log", patience_s=120.0)
    try:
        options = {
            "folder": str(tmp_path),
            "dtype": "float32",
            "num_defined_ids": 512,
            "eos_token_ids": [2],
            "max_context": 64,
            "max_slots": 4,
            "max_width": 4,
            "gpu_memory_utilization": 0.4,
            "kv_cache_bytes": None,
            "max_num_batched_tokens": None,
            "enforce_eager": True,
            "takes_nccl": False,
        }
        with pytest.raises(ConfigError, match=r"^rollout\.engine=vllm: vLLM cannot load the student \(.+\)") as caught:
            process.start(options, tmp_path)
        assert "\n" not in caught.value.message
    finally:
        process.close()
    assert_none_is_left(mark)
