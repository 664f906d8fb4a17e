"""Our sides of `score_throughput`: floor and engine in this process, a teacher process behind gRPC and Redis."""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch.nn import functional

from benchmarks.random_model import TEACHER, TENANT, Load, Shape, save_model
from opd.client import SyncScoreClient
from opd.queue.embedded import EmbeddedRedis
from opd.types import Ids, ScoreRequest, Scores
from services.teacher_server.engines.passes import pad_right
from services.teacher_server.engines.transformers_engine import EngineLimits, TransformersEngine, load_engine
from services.teacher_server.engines.transformers_model import load_model
from testbed.processes import Processes

BATCH_SEQUENCES = 16
_READY_S = 300.0


class Sides:
    """The load and everything of ours that scores it; leaving the context ends the processes."""

    def __init__(self, folder: Path, num_batches: int, num_threads: int) -> None:
        self.model_folder = folder / "model"
        self._folder = folder
        self._num_requests = num_batches * BATCH_SEQUENCES
        self._num_threads = num_threads
        self._load = Load()
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        os.environ["OMP_NUM_THREADS"] = str(self._num_threads)
        torch.set_num_threads(self._num_threads)
        save_model(self.model_folder, Shape())
        self._model = load_model(self.model_folder, device="cpu", dtype="float32", max_context=0)
        # Distinct prompts share nothing, so the engine is measured as it is served, with the cache on.
        self._engine = self._load_engine()
        redis = self._opened.enter_context(EmbeddedRedis(self._folder / "redis"))
        processes = self._opened.enter_context(Processes(log_dir=self._folder / "logs"))
        ready_file = self._folder / "ready.json"
        arguments = [
            f"model={self.model_folder}", f"teacher={TEACHER}", f"redis_url={redis.url}", "device=cpu",
            f"batching.max_batch_tokens={self._batch_tokens}", f"torch_threads={self._num_threads}",
        ]  # fmt: skip
        teacher = processes.start(
            "teacher", ["-m", "services.teacher_server", *arguments, "--ready-file", str(ready_file)]
        )
        processes.wait_until(teacher, ready_file.is_file, _READY_S)
        grpc_port = json.loads(ready_file.read_text(encoding="utf-8"))["grpc_port"]
        self._grpc = self._connect(f"grpc://127.0.0.1:{grpc_port}")
        self._redis = self._connect(redis.url)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def sides(self) -> dict[str, Callable[[str], int]]:
        """By name; each scores the load that the name given makes."""
        return {
            "floor": lambda name: self._floor(self.load(name)),
            "engine": lambda name: self._in_process(self._engine, self.load(name)),
            "grpc": lambda name: self._through(self._grpc, self.load(name)),
            "redis": lambda name: self._through(self._redis, self.load(name)),
        }

    def load(self, name: str) -> list[ScoreRequest]:
        """Requests with distinct prompts, other ones for every name."""
        return self._load.requests(name, self._num_requests)

    def shared_prefix_gains(self) -> dict[str, float]:
        """How much faster 16 rollouts of 2 prompts are than of 16, with short prompts and with long ones."""
        return {
            "shared_prefix_gain": self._gain(self._load),
            "shared_prefix_gain_long_prompt": self._gain(Load(num_prompt=448, num_response=64)),
        }

    def _gain(self, load: Load) -> float:
        seconds = []
        for num_prompts in (BATCH_SEQUENCES, 2):
            engine = self._load_engine()
            requests = load.requests(f"prefix{num_prompts}", BATCH_SEQUENCES, num_prompts=num_prompts)
            started = time.perf_counter()
            self._in_process(engine, requests)
            seconds.append(time.perf_counter() - started)
        return round(seconds[0] / seconds[1], 2)

    @property
    def _batch_tokens(self) -> int:
        return BATCH_SEQUENCES * (self._load.num_prompt + self._load.num_response)

    def _load_engine(self) -> TransformersEngine:
        limits = EngineLimits(max_batch_tokens=self._batch_tokens)
        return load_engine(
            str(self.model_folder), teacher=TEACHER, device="cpu", dtype="float32", max_context=0, limits=limits
        )

    def _connect(self, url: str) -> SyncScoreClient:
        return self._opened.enter_context(SyncScoreClient.connect(url, teacher=TEACHER, tenant=TENANT))

    def _floor(self, requests: Sequence[ScoreRequest]) -> int:
        """The decoder over whole sequences and the head over response rows, as wide as the engine's; nothing else."""
        weight_VH, chunk = self._model.head.weight_VH, EngineLimits().row_chunk
        with torch.inference_mode():
            for start in range(0, len(requests), BATCH_SEQUENCES):
                batch = requests[start : start + BATCH_SEQUENCES]
                sequences = [_inputs(request) for request in batch]
                hidden_BTH = self._model.hidden(torch.from_numpy(pad_right(sequences)))
                for request, hidden_TH in zip(batch, hidden_BTH, strict=True):
                    rows_RH = hidden_TH[request.prompt_token_ids.size - 1 :]
                    for part_CH in rows_RH.split(chunk):
                        functional.linear(part_CH, weight_VH)
        return _num_response_tokens(requests)

    def _in_process(self, engine: TransformersEngine, requests: Sequence[ScoreRequest]) -> int:
        for start in range(0, len(requests), BATCH_SEQUENCES):
            outcomes = engine.score(requests[start : start + BATCH_SEQUENCES])
            assert all(isinstance(outcome, Scores) for outcome in outcomes)
        return _num_response_tokens(requests)

    def _through(self, client: SyncScoreClient, requests: Sequence[ScoreRequest]) -> int:
        for future in [client.submit(request) for request in requests]:
            future.result()
        return _num_response_tokens(requests)


def _inputs(request: ScoreRequest) -> Ids:
    return np.concatenate([request.prompt_token_ids, request.response_token_ids[:-1]])


def _num_response_tokens(requests: Sequence[ScoreRequest]) -> int:
    return sum(request.response_token_ids.size for request in requests)
