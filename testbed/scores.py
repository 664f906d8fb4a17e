"""Accuracies of testbed models on the held-out problems, remembered by content.

An evaluation is determined by the weights, the problems, the sampling settings and the seed. Those of the bundled
models are kept in `testbed/scores/`, so that a demo needs to evaluate nothing but the student it has trained; `key`
changes with any of them, and then the model is evaluated again.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from opd.lifecycle import DIE_WITH_PARENT, die_with_parent
from services.trainer.evaluation.command import evaluate_command
from services.trainer.rollout.base import SamplingParams

SCORES = Path(__file__).parent / "scores"
NUM_PROBLEMS = 128
NUM_SAMPLES = 16
EVALUATION_SEED = 0
_MAX_RESPONSE_TOKENS = 320


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One model under one sampling setting."""

    accuracy: float
    """avg@16 over the problems."""
    low: float
    high: float
    accuracy_by_problem: tuple[float, ...]


TEMPERATURE_ONE = SamplingParams(
    temperature=1.0, top_p=1.0, max_response_tokens=_MAX_RESPONSE_TOKENS, seed=EVALUATION_SEED
)
"""The sampling of training, under which the loss is defined."""
PAPER = SamplingParams(temperature=0.7, top_p=0.95, max_response_tokens=_MAX_RESPONSE_TOKENS, seed=EVALUATION_SEED)
"""The sampling of the paper's evaluations."""


def evaluate_all(
    jobs: Sequence[tuple[Path, SamplingParams]], data: Path, *, cache: Path, console: Console
) -> list[Score]:
    """The scores of (model folder, sampling) pairs: known ones are read, the others sampled side by side.

    Each evaluation has a process and a core of its own; graded samples are kept in `cache`.
    """
    unknown = [job for job in jobs if not _known_file(*job, data).is_file()]
    results = dict(_sampled(unknown, data, cache, console))
    for job in jobs:
        if job not in results:
            results[job] = json.loads(_known_file(*job, data).read_text(encoding="utf-8"))
    return [_score(results[job]) for job in jobs]


def _sampled(
    jobs: Sequence[tuple[Path, SamplingParams]], data: Path, cache: Path, console: Console
) -> Iterator[tuple[tuple[Path, SamplingParams], dict[str, Any]]]:
    """Evaluates every job and gives each result as soon as it and those before it are there."""
    if not jobs:
        return
    names = ", ".join(sorted({model.name for model, _ in jobs}))
    with _workers(len(jobs)) as pool, console.status(f"evaluating {names}, {NUM_PROBLEMS} problems x {NUM_SAMPLES}"):
        futures = {job: pool.submit(_evaluate, *job, data, cache) for job in jobs}
        for job, future in futures.items():
            yield job, future.result()


def _workers(num_jobs: int) -> ProcessPoolExecutor:
    """Processes that end with this one. Started afresh, since a fork would inherit the tensor library's threads."""
    os.environ |= {DIE_WITH_PARENT: str(os.getpid()), "OMP_NUM_THREADS": "1"}
    num_workers = min(num_jobs, os.cpu_count() or 1)
    return ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=die_with_parent)


def _known_file(model: Path, sampling: SamplingParams, data: Path) -> Path:
    return SCORES / f"{key(model, sampling, data)}.json"


def remember(models: Sequence[Path], data: Path, *, cache: Path, console: Console) -> None:
    """Evaluates models under both samplings and keeps their scores in `testbed/scores`."""
    jobs = [(model, sampling) for model in models for sampling in (TEMPERATURE_ONE, PAPER)]
    SCORES.mkdir(exist_ok=True)
    for job, result in _sampled([job for job in jobs if not _known_file(*job, data).is_file()], data, cache, console):
        _known_file(*job, data).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def key(model: Path, sampling: SamplingParams, data: Path) -> str:
    """Hash of everything that decides the score: weights, tokenizer, problems, sampling, seed."""
    digest = hashlib.sha256()
    for path in (*sorted(model.glob("*.safetensors")), model / "tokenizer.json", model / "config.json", data):
        digest.update(path.read_bytes())
    digest.update(repr((sampling, NUM_PROBLEMS, NUM_SAMPLES)).encode())
    return digest.hexdigest()[:24]


def _evaluate(model: Path, sampling: SamplingParams, data: Path, cache: Path) -> dict[str, Any]:
    report = evaluate_command(
        [str(model)],
        [str(data)],
        sampling=sampling,
        num_samples=NUM_SAMPLES,
        max_problems=NUM_PROBLEMS,
        device="cpu",
        cache_folder=cache,
    )
    result: dict[str, Any] = report["results"][0]
    return result


def _score(result: dict[str, Any]) -> Score:
    accuracy = result["total"]["accuracy"]
    return Score(
        accuracy=accuracy["value"],
        low=accuracy["low"],
        high=accuracy["high"],
        accuracy_by_problem=tuple(result["accuracy_by_problem"]),
    )
