"""Evaluates a model on problems with known answers: n sampled responses each, graded, summed up."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from opd.errors import ConfigError
from services.trainer.evaluation.grading import is_equal
from services.trainer.evaluation.results import EvaluationResult, GradedSample, summarize
from services.trainer.evaluation.sampling import (
    PAPER_NUM_SAMPLES,
    PAPER_SAMPLING,
    EvaluatedModel,
    Response,
    bounded_by_context,
    progress_bar,
    sample_responses,
)
from services.trainer.prompts import TokenizedPrompt
from services.trainer.rollout.base import SamplingParams
from services.trainer.templates import get_template

__all__ = [
    "PAPER_NUM_SAMPLES",
    "PAPER_SAMPLING",
    "EvaluatedModel",
    "check_gradable",
    "grade_response",
    "run_evaluation",
]


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
    check_gradable(prompts, num_samples)
    token_ids = [prompt.prompt_token_ids for prompt in prompts]
    bounded = bounded_by_context(sampling, token_ids, model.engine.max_context)
    responses = sample_responses(
        model, token_ids, sampling=bounded, num_samples=num_samples, cache_folder=cache_folder, console=console,
        description=f"{model.name} on {data}",
    )  # fmt: skip
    return _result(model, prompts, _graded(prompts, responses, console), data, bounded)


def check_gradable(prompts: Sequence[TokenizedPrompt], num_samples: int) -> None:
    """`ConfigError` for a number of samples below 1, no problems, or one without an answer or a template."""
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


def grade_response(prompt: TokenizedPrompt, response: Response) -> GradedSample:
    """The verdict on one response, by the extractor of its prompt's template."""
    extracted = get_template(prompt.template).extract(response.text)
    assert prompt.answer is not None
    return GradedSample(
        problem=response.problem,
        sample=response.sample,
        is_correct=extracted is not None and is_equal(extracted, prompt.answer),
        extracted=extracted,
        num_tokens=len(response.token_ids),
        is_truncated=response.is_truncated,
        response=response.text,
    )


def _graded(
    prompts: Sequence[TokenizedPrompt], responses: Sequence[Sequence[Response]], console: Console | None
) -> list[list[GradedSample]]:
    graded = []
    with progress_bar(console, transient=True) as progress:
        task = progress.add_task("grading", total=sum(len(part) for part in responses))
        for prompt, part in zip(prompts, responses, strict=True):
            graded.append([grade_response(prompt, response) for response in part])
            progress.advance(task, len(part))
    return graded


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
        sampling=asdict(sampling),
        total=summarize(samples, seed=sampling.seed),
        by_source={name: summarize(part, seed=sampling.seed) for name, part in sources.items()},
        by_level={name: summarize(part, seed=sampling.seed) for name, part in levels.items() if name},
        accuracy_by_problem=tuple(sum(sample.is_correct for sample in part) / len(part) for part in samples),
    )
