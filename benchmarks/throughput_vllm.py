"""The vLLM side of `score_throughput`: its OpenAI-compatible server as a process, asked as its users ask it."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.report import say
from opd.types import ScoreRequest

TOP_K = 16
_READY_S = 600.0
_STOP_S = 40.0


def why_no_vllm(venv: Path | None) -> str | None:
    """Why this side cannot be measured; None when it can."""
    if venv is None:
        return "left out by --quick"
    if not (venv / "bin" / "python").is_file():
        return f"{venv} is not there: make test-vllm makes it"
    return None


class VllmServer:
    """One server for as long as the context lasts."""

    def __init__(self, venv: Path, model: Path, folder: Path, num_threads: int) -> None:
        self._venv = venv
        self._model = model
        self._log = folder / "vllm.log"
        self._num_threads = num_threads
        self._port = _free_port()

    def __enter__(self) -> Self:
        environment = {
            **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(self._num_threads), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        arguments = [
            *("-m", "vllm.entrypoints.openai.api_server", "--model", str(self._model), "--served-model-name", "random"),
            *("--host", "127.0.0.1", "--port", str(self._port), "--dtype", "float32", "--max-model-len", "520"),
            *("--max-num-batched-tokens", "8192", "--max-num-seqs", "16", "--max-logprobs", str(TOP_K)),
            *("--no-enable-prefix-caching", "--disable-log-stats"),
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(self._venv.absolute() / "bin" / "python"), *arguments], env=environment, stdout=log, stderr=log
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def score(self, requests: Sequence[ScoreRequest]) -> int:
        """Top-k log-probs at every position, read from the JSON answers; returns the response tokens."""
        return asyncio.run(self._score_all(requests))

    async def _score_all(self, requests: Sequence[ScoreRequest]) -> int:
        return sum(await asyncio.gather(*[asyncio.to_thread(self._score_one, request) for request in requests]))

    def _score_one(self, request: ScoreRequest) -> int:
        ids = [*request.prompt_token_ids.tolist(), *request.response_token_ids.tolist()]
        wanted = {
            "model": "random", "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP_K,
            "ignore_eos": True,
        }  # fmt: skip
        url = f"http://127.0.0.1:{self._port}/v1/completions"
        headers = {"Content-Type": "application/json"}
        call = urllib.request.Request(url, data=json.dumps(wanted).encode(), headers=headers)
        with urllib.request.urlopen(call, timeout=_READY_S) as answer:
            found = json.load(answer)["choices"][0]["prompt_logprobs"]
        rows = found[request.prompt_token_ids.size :]
        assert all(len(row) >= TOP_K for row in rows)
        return len(rows)

    def _wait_until_ready(self) -> None:
        say("starting vLLM: it compiles its model, which takes a minute or two")
        deadline = time.monotonic() + _READY_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vLLM did not start:\n{self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(1.0)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
