"""Sampled responses to prompts, each with a seed of its own, kept on disk: what every evaluation begins with.

A sample depends on the evaluation's seed, its prompt's place and its own number, never on how far a run got: asking for
more samples later, or going on after an interruption, continues the same evaluation. Responses are kept and verdicts
are not, so that correcting an answer costs no sampling, and another command finds the same responses.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from opd.errors import ConfigError
from opd.types import FinishReason, Ids, Rollout
from services.trainer.evaluation.sample_cache import SampleCache
from services.trainer.rollout.base import RolloutEngine, RolloutRequest, SamplingParams, derive_seed

logger = logging.getLogger(__name__)

PAPER_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95, max_response_tokens=31_744)
"""Section 4 of the algorithm contract, as the paper evaluates."""
PAPER_NUM_SAMPLES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedModel:
    """What is asked, and how its tokens become text again."""

    name: str
    fingerprint: str
    engine: RolloutEngine
    """Need not record statistics."""
    decode: Callable[[Sequence[int]], str]
    """Response ids without the EOS -> text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One sampled response, as it is kept."""

    problem: int
    """Place of its prompt in the list that was sampled from."""
    sample: int
    token_ids: Ids
    """[R], a sampled EOS included."""
    is_truncated: bool
    text: str
    """Without the EOS."""

    @property
    def text_token_ids(self) -> list[int]:
        """Those behind `text`: without the EOS, which only a response that was not cut off ends with."""
        token_ids: list[int] = self.token_ids.tolist()
        return token_ids if self.is_truncated else token_ids[:-1]

    def as_json(self) -> dict[str, Any]:
        """See `SampleRecord`."""
        return {**asdict(self), "token_ids": self.token_ids.tolist()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """See `SampleRecord`."""
        return cls(**{**found, "token_ids": np.array(found["token_ids"], np.int32)})


def sample_responses(
    model: EvaluatedModel,
    prompts: Sequence[Ids],
    *,
    sampling: SamplingParams,
    num_samples: int,
    cache_folder: Path | None = None,
    console: Console | None = None,
    description: str = "",
) -> list[list[Response]]:
    """`num_samples` responses to each prompt; what the cache does not have is sampled, with progress to `console`."""
    cache = SampleCache(cache_folder, {"responses": identity(model.fingerprint, prompts, sampling)}, Response)
    try:
        _fill(cache, model, prompts, sampling, num_samples, console, description or model.name)
    finally:
        cache.close()
    return [[cache.samples[problem, index] for index in range(num_samples)] for problem in range(len(prompts))]


def identity(fingerprint: str, prompts: Sequence[Ids], sampling: SamplingParams) -> dict[str, Any]:
    """Everything that decides what is sampled."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt.tolist()).encode())
    return {"model": fingerprint, "prompts": digest.hexdigest(), **asdict(sampling)}


def bounded_by_context(sampling: SamplingParams, prompts: Sequence[Ids], max_context: int) -> SamplingParams:
    """No more response tokens than fit behind the longest prompt; `ConfigError` when none does."""
    longest = max(prompt.size for prompt in prompts)
    room = max_context - longest
    if room < 1:
        raise ConfigError(
            f"the longest prompt has {longest} tokens, the model's context {max_context}; leave longer prompts out"
        )
    if room >= sampling.max_response_tokens:
        return sampling
    logger.info("responses end at %d tokens: the context is %d, the longest prompt %d", room, max_context, longest)
    return replace(sampling, max_response_tokens=room)


def progress_bar(console: Console | None, *, transient: bool = False) -> Progress:
    """Counts what is done and guesses the time left; silent without a console, gone at the end where transient."""
    counts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns = (*counts, TextColumn("left"), TimeRemainingColumn())
    is_shown = console is not None and (console.is_terminal or not transient)
    return Progress(*columns, console=console, disable=not is_shown, transient=transient)


def _fill(
    cache: SampleCache[Response],
    model: EvaluatedModel,
    prompts: Sequence[Ids],
    sampling: SamplingParams,
    num_samples: int,
    console: Console | None,
    description: str,
) -> None:
    """Samples every (problem, sample) that is missing, each on disk as soon as it ends."""
    wanted = {(problem, sample) for problem in range(len(prompts)) for sample in range(num_samples)}
    missing = sorted(wanted - cache.samples.keys())
    places = {f"eval.{problem}.{sample}": (problem, sample) for problem, sample in missing}
    requests = [
        RolloutRequest(
            rollout_id=name,
            group=problem,
            prompt_token_ids=np.asarray(prompts[problem], np.int32),
            seed=derive_seed(sampling.seed, problem, sample),
        )
        for name, (problem, sample) in places.items()
    ]
    with progress_bar(console) as progress:
        task = progress.add_task(description, total=len(wanted), completed=len(wanted) - len(missing))

        def keep(rollout: Rollout) -> None:
            cache.add(_response(rollout, *places[rollout.rollout_id], model.decode))
            progress.advance(task)

        model.engine.sample(requests, sampling, on_finish=keep)


def _response(rollout: Rollout, problem: int, sample: int, decode: Callable[[Sequence[int]], str]) -> Response:
    response = Response(
        problem=problem,
        sample=sample,
        token_ids=rollout.response_token_ids,
        is_truncated=rollout.finish_reason is FinishReason.LENGTH,
        text="",
    )
    return replace(response, text=decode(response.text_token_ids))
