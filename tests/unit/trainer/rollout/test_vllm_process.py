"""The way between trainer and engine: messages as they were, and a process that is no engine."""

import importlib.util
import os
import signal
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest

from opd.errors import ConfigError, RolloutEngineError
from services.trainer.rollout.vllm_channel import Channel, Message
from services.trainer.rollout.vllm_process import VllmProcess
from tests.unit.trainer.rollout.tiny_students import qwen


def test_messages_arrive_as_they_were() -> None:
    ends = [Channel(end) for end in Pipe()]
    arrays = (
        np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::-1],
        np.array([[np.nan, -np.inf]], np.float32),
        np.zeros((4, 0), np.int32),
        np.zeros(3 << 20, np.int64),
    )
    sent = Message(kind="finished", call=7, fields={"seeds": [2**62 + 1], "k": None}, arrays=arrays)
    # More than a pipe holds, so that the sender waits for the receiver.
    sender = threading.Thread(target=ends[0].send, args=(sent,))
    sender.start()
    found = ends[1].receive()
    sender.join()
    assert (found.kind, found.call, found.fields) == (sent.kind, sent.call, sent.fields)
    for expected, array in zip(arrays, found.arrays, strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype and array.flags.writeable
    ends[0].close()
    with pytest.raises(EOFError):
        ends[1].receive()
    ends[1].close()


def start(tmp_path: Path, python: Path | None = None) -> VllmProcess:
    return VllmProcess(python=python, environment={}, log=tmp_path / "engine.log", patience_s=60.0)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="this is the Python without vLLM")
def test_a_python_without_vllm_says_so(tmp_path: Path) -> None:
    qwen().save_pretrained(tmp_path)
    process = start(tmp_path)
    options = {
        "folder": str(tmp_path),
        "dtype": "float32",
        "num_defined_ids": 40,
        "eos_token_ids": [1, 2],
        "max_context": 32,
        "max_slots": 4,
        "max_width": 4,
        "gpu_memory_utilization": 0.4,
        "kv_cache_bytes": None,
        "max_num_batched_tokens": None,
        "enforce_eager": True,
        "takes_nccl": False,
    }
    try:
        with pytest.raises(ConfigError, match=r"^rollout\.engine=vllm: vLLM cannot load.*No module named 'vllm'"):
            process.start(options, tmp_path)
    finally:
        process.close()


def test_calls_before_the_start_are_refused(tmp_path: Path) -> None:
    process = start(tmp_path)
    try:
        for kind, fields in (("load", {"folder": "/", "version": 1}), ("dance", {})):
            with pytest.raises(Exception, match=r"before it was started|knows no call 'dance'"):
                process.ask(kind, fields)
    finally:
        process.close()


def test_a_python_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^rollout\.vllm\.python=.*no-python: cannot be started \(No such file"):
        start(tmp_path, tmp_path / "no-python")


def test_a_program_that_is_no_engine_is_a_typed_error(tmp_path: Path) -> None:
    process = start(tmp_path, Path("/bin/false"))
    try:
        with pytest.raises(RolloutEngineError, match=r"is gone \(exit code 1\); .*engine\.log may say why"):
            process.ask("load", {})
    finally:
        process.close()


def test_closing_leaves_no_reader_where_another_process_holds_the_socket(tmp_path: Path) -> None:
    script, written = tmp_path / "python", tmp_path / "pid"
    script.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {written}.part\nmv {written}.part {written}\n")
    script.chmod(0o755)
    process = start(tmp_path, script)
    try:
        deadline = time.monotonic() + 30
        while not written.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.close()
    os.kill(int(written.read_text()), signal.SIGKILL)
    assert "rollout-engine" not in [thread.name for thread in threading.enumerate()]


def test_closing_ends_the_process(tmp_path: Path) -> None:
    process = start(tmp_path, Path(sys.executable))
    with pytest.raises(Exception, match="before it was started"):
        process.ask("load", {"folder": "/", "version": 1})
    process.close()
    assert process._process.returncode in (0, -signal.SIGKILL)
    with pytest.raises(RolloutEngineError, match="is gone"):
        process.ask("load", {"folder": "/", "version": 1})
