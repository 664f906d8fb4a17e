"""Accuracies of testbed models on the held-out problems, remembered by content.

An evaluation is determined by the weights, the problems, the sampling settings and the seed. Those of the bundled
models are kept in `testbed/scores/`, so that a demo needs to evaluate nothing but the student it has trained; `key`
changes with any of them, and then the model is evaluated again.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

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
    by_level: dict[str, float]


TEMPERATURE_ONE = SamplingParams(
    temperature=1.0, top_p=1.0, max_response_tokens=_MAX_RESPONSE_TOKENS, seed=EVALUATION_SEED
)
"""The sampling of training, under which the loss is defined."""
PAPER = SamplingParams(temperature=0.7, top_p=0.95, max_response_tokens=_MAX_RESPONSE_TOKENS, seed=EVALUATION_SEED)
"""The sampling of the paper's evaluations."""


def evaluate(model: Path, data: Path, sampling: SamplingParams, *, cache: Path, console: Console | None) -> Score:
    """The score of a model folder, from `testbed/scores` where it is known; samples are kept in `cache`."""
    known = SCORES / f"{key(model, data, sampling)}.json"
    if known.is_file():
        return _score(json.loads(known.read_text(encoding="utf-8")))
    return _score(_evaluate(model, data, sampling, cache, console))


def remember(model: Path, data: Path, sampling: SamplingParams, *, cache: Path, console: Console | None) -> None:
    """Evaluates a bundled model and keeps its score in `testbed/scores`."""
    result = _evaluate(model, data, sampling, cache, console)
    SCORES.mkdir(exist_ok=True)
    path = SCORES / f"{key(model, data, sampling)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def key(model: Path, data: Path, sampling: SamplingParams) -> str:
    """Hash of everything that decides the score: weights, tokenizer, problems, sampling, seed."""
    digest = hashlib.sha256()
    for path in (*sorted(model.glob("*.safetensors")), model / "tokenizer.json", model / "config.json", data):
        digest.update(path.read_bytes())
    digest.update(repr((sampling, NUM_PROBLEMS, NUM_SAMPLES)).encode())
    return digest.hexdigest()[:24]


def _evaluate(
    model: Path, data: Path, sampling: SamplingParams, cache: Path, console: Console | None
) -> dict[str, Any]:
    report = evaluate_command(
        [str(model)],
        [str(data)],
        sampling=sampling,
        num_samples=NUM_SAMPLES,
        max_problems=NUM_PROBLEMS,
        device="cpu",
        cache_folder=cache,
        console=console,
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
        by_level={level: part["accuracy"]["value"] for level, part in result["by_level"].items()},
    )
