"""Evaluates a model on problems with known answers: n sampled responses each, graded, summed up.

Every sample has its own seed, from the evaluation's seed, the problem and the sample's number: asking for more samples
later, or going on after an interruption, continues the same evaluation.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opd.errors import ConfigError
from opd.types import FinishReason, Rollout
from services.trainer.evaluation.grading import is_equal
from services.trainer.evaluation.results import EvaluationResult, GradedSample, summarize
from services.trainer.evaluation.sample_cache import SampleCache
from services.trainer.prompts import TokenizedPrompt
from services.trainer.rollout.base import RolloutEngine, RolloutRequest, SamplingParams, derive_seed
from services.trainer.templates import get_template

logger = logging.getLogger(__name__)

PAPER_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95, max_response_tokens=31_744)
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


def run_evaluation(
    model: EvaluatedModel,
    prompts: Sequence[TokenizedPrompt],
    *,
    data: str,
    sampling: SamplingParams = PAPER_SAMPLING,
    num_samples: int = PAPER_NUM_SAMPLES,
    cache_folder: Path | None = None,
    console: Console | None = None,
) -> EvaluationResult:
    """Samples what the cache does not have, grades it and sums up; progress goes to `console`.

    `sampling.max_response_tokens` is bounded by the model's context. Raises `ConfigError` for problems that cannot be
    graded and a context too small for a prompt.
    """
    _check(prompts, num_samples)
    bounded = _bounded(sampling, prompts, model.engine.max_context)
    cache = SampleCache(cache_folder, _identity(model, prompts, bounded))
    try:
        _fill(cache, model, prompts, bounded, num_samples, console)
    finally:
        cache.close()
    samples = [[cache.samples[problem, index] for index in range(num_samples)] for problem in range(len(prompts))]
    return _result(model, prompts, samples, data, bounded)


def _check(prompts: Sequence[TokenizedPrompt], num_samples: int) -> None:
    if num_samples < 1:
        raise ConfigError(f"num_samples: {num_samples} is too small; give 1 or more")
    if not prompts:
        raise ConfigError("there is no problem to evaluate on; give a prompt set with answers")
    for prompt in prompts:
        name = f"problem {prompt.problem.index} of {prompt.problem.source}"
        if prompt.answer is None:
            raise ConfigError(f"{name} has no reward_model.ground_truth, so it cannot be graded; remove the row")
        if not prompt.template:
            raise ConfigError(f"{name} is in no known template, so its answer cannot be found; name a template")


def _bounded(sampling: SamplingParams, prompts: Sequence[TokenizedPrompt], max_context: int) -> SamplingParams:
    """No more response tokens than fit behind the longest prompt."""
    longest = max(prompt.prompt_token_ids.size for prompt in prompts)
    room = max_context - longest
    if room < 1:
        raise ConfigError(
            f"the longest prompt has {longest} tokens, the model's context {max_context}; leave longer prompts out"
        )
    if room >= sampling.max_response_tokens:
        return sampling
    logger.info("responses end at %d tokens: the context is %d, the longest prompt %d", room, max_context, longest)
    return replace(sampling, max_response_tokens=room)


def _identity(model: EvaluatedModel, prompts: Sequence[TokenizedPrompt], sampling: SamplingParams) -> dict[str, Any]:
    """Everything that decides what is sampled and how it is graded."""
    digest = hashlib.sha256()
    for prompt in prompts:
        ids = prompt.prompt_token_ids.tolist()
        digest.update(json.dumps([ids, prompt.template, prompt.answer]).encode())
    return {"model": model.fingerprint, "prompts": digest.hexdigest(), **_sampling_fields(sampling)}


def _sampling_fields(sampling: SamplingParams) -> dict[str, float | int]:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_response_tokens": sampling.max_response_tokens,
        "seed": sampling.seed,
    }


def _fill(
    cache: SampleCache,
    model: EvaluatedModel,
    prompts: Sequence[TokenizedPrompt],
    sampling: SamplingParams,
    num_samples: int,
    console: Console | None,
) -> None:
    """Samples and grades every (problem, sample) that is missing, each on disk as soon as it ends."""
    wanted = {(problem, sample) for problem in range(len(prompts)) for sample in range(num_samples)}
    missing = sorted(wanted - cache.samples.keys())
    places = {f"eval.{problem}.{sample}": (problem, sample) for problem, sample in missing}
    requests = [
        RolloutRequest(
            rollout_id=name,
            group=problem,
            prompt_token_ids=prompts[problem].prompt_token_ids,
            seed=derive_seed(sampling.seed, problem, sample),
        )
        for name, (problem, sample) in places.items()
    ]
    with _progress(console) as progress:
        task = progress.add_task(model.name, total=len(wanted), completed=len(wanted) - len(missing))

        def keep(rollout: Rollout) -> None:
            problem, sample = places[rollout.rollout_id]
            cache.add(_graded(rollout, prompts[problem], problem, sample, model.decode))
            progress.advance(task)

        model.engine.sample(requests, sampling, on_finish=keep)


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=console is None)


def _graded(
    rollout: Rollout, prompt: TokenizedPrompt, problem: int, sample: int, decode: Callable[[Sequence[int]], str]
) -> GradedSample:
    is_truncated = rollout.finish_reason is FinishReason.LENGTH
    token_ids = rollout.response_token_ids.tolist()
    text = decode(token_ids if is_truncated else token_ids[:-1])
    extracted = get_template(prompt.template).extract(text)
    assert prompt.answer is not None
    return GradedSample(
        problem=problem,
        sample=sample,
        is_correct=extracted is not None and is_equal(extracted, prompt.answer),
        extracted=extracted,
        num_tokens=len(token_ids),
        is_truncated=is_truncated,
        response=text,
    )


def _result(
    model: EvaluatedModel,
    prompts: Sequence[TokenizedPrompt],
    samples: Sequence[Sequence[GradedSample]],
    data: str,
    sampling: SamplingParams,
) -> EvaluationResult:
    def parts(names: Sequence[str]) -> Mapping[str, list[Sequence[GradedSample]]]:
        grouped: dict[str, list[Sequence[GradedSample]]] = {}
        for name, problem_samples in zip(names, samples, strict=True):
            grouped.setdefault(name, []).append(problem_samples)
        return dict(sorted(grouped.items()))

    sources = parts([prompt.problem.source for prompt in prompts])
    levels = parts([prompt.problem.level for prompt in prompts])
    return EvaluationResult(
        model=model.name,
        fingerprint=model.fingerprint,
        data=data,
        sampling=_sampling_fields(sampling),
        total=summarize(samples, seed=sampling.seed),
        by_source={name: summarize(part, seed=sampling.seed) for name, part in sources.items()},
        by_level={name: summarize(part, seed=sampling.seed) for name, part in levels.items() if name},
        accuracy_by_problem=tuple(sum(sample.is_correct for sample in part) / len(part) for part in samples),
    )
