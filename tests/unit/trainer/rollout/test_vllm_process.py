"""The way between trainer and engine: messages as they were, and a process that is no engine."""

import importlib.util
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest

from opd.errors import ConfigError, RolloutEngineError
from services.trainer.rollout.vllm_channel import Channel, Message
from services.trainer.rollout.vllm_process import VllmProcess
from services.trainer.stop import StopRequested
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


def start(tmp_path: Path, python: Path | None = None, patience_s: float = 60.0) -> VllmProcess:
    return VllmProcess(python=python, environment={}, log=tmp_path / "engine.log", patience_s=patience_s)


def stopped(tmp_path: Path, patience_s: float) -> VllmProcess:
    """An engine that has answered, and then is stopped: it lives and does nothing."""
    process = start(tmp_path)
    with pytest.raises(Exception, match="knows no call"):
        process.ask("dance", {})
    process._patience_s = patience_s
    os.kill(process.pid, signal.SIGSTOP)
    return process


def within(limit_s: float, do: Callable[[], object]) -> BaseException | None:
    """What `do` raises; fails where it takes longer."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            do()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    assert not thread.is_alive(), f"still not done after {limit_s} s"
    return raised[0] if raised else None


MORE_THAN_A_SOCKET_HOLDS = np.zeros(1 << 20, np.int32)


@pytest.mark.parametrize("patience_s", [0.5, 1e-9])
def test_an_engine_that_reads_nothing_ends_the_call_and_leaves_no_process(tmp_path: Path, patience_s: float) -> None:
    process = stopped(tmp_path, patience_s)
    try:
        error = within(10, lambda: list(process.converse("sample", {}, [MORE_THAN_A_SOCKET_HOLDS])))
        assert isinstance(error, RolloutEngineError)
        assert re.match(
            rf"rollout engine: it read nothing for {patience_s:g} s, so it was ended; .*--resume", str(error)
        )
        assert process._process.returncode == -signal.SIGKILL
        assert within(5, process.close) is None
    finally:
        process._process.kill()
    assert "rollout-engine" not in [thread.name for thread in threading.enumerate()]


def fill(process: VllmProcess) -> None:
    """Until the socket takes no more, by whole messages that no call waits for."""
    process._limit_sending(0.1)
    with pytest.raises(BlockingIOError):
        for _ in range(1 << 16):
            process._channel.send(Message(kind="stop", call=0, fields={"filling": "." * 1000}))


def test_closing_does_not_wait_for_an_engine_that_reads_nothing(tmp_path: Path) -> None:
    process = stopped(tmp_path, 600.0)
    try:
        fill(process)
        assert within(20, process.close) is None
    finally:
        process._process.kill()
    assert process._process.returncode == -signal.SIGKILL
    assert "rollout-engine" not in [thread.name for thread in threading.enumerate()]


def test_closing_ends_another_threads_call_that_is_not_sent_yet(tmp_path: Path) -> None:
    process = stopped(tmp_path, 600.0)
    raised: list[BaseException | None] = []

    def call() -> None:
        raised.append(within(30, lambda: list(process.converse("sample", {}, [MORE_THAN_A_SOCKET_HOLDS]))))

    caller = threading.Thread(target=call)
    try:
        caller.start()
        deadline = time.monotonic() + 10
        while not process._channel._lock.locked():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert within(20, process.close) is None
    finally:
        process._process.kill()
        caller.join()
    assert isinstance(raised[0], RolloutEngineError)
    assert "rollout-engine" not in [thread.name for thread in threading.enumerate()]


def test_a_call_interrupted_while_it_is_sent_leaves_no_engine_with_half_a_message(tmp_path: Path) -> None:
    process = stopped(tmp_path, 600.0)

    def interrupt(*_: object) -> None:
        raise StopRequested(signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(StopRequested):
            list(process.converse("sample", {}, [MORE_THAN_A_SOCKET_HOLDS]))
        assert process._process.returncode == -signal.SIGKILL
    finally:
        signal.signal(signal.SIGALRM, before)
        process._process.kill()
        process.close()


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
