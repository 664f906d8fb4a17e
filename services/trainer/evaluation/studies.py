"""What `opd continuation` and `opd auroc` do: models and problems opened, the study made, table, JSON and figure."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from opd.credentials import Credentials
from opd.errors import ConfigError
from services.trainer.evaluation.command import write_json
from services.trainer.evaluation.continuation import (
    continuation_lines,
    continuation_table,
    run_continuation,
)
from services.trainer.evaluation.evaluation import check_gradable, grade_response
from services.trainer.evaluation.figures import draw_continuation, draw_rewards
from services.trainer.evaluation.logprobs import LocalSource, read_mean_logprobs
from services.trainer.evaluation.opening import Loading, OpenedModel, labels, open_model, open_problems
from services.trainer.evaluation.results import as_plain_json
from services.trainer.evaluation.reward import NO_EVIDENCE, RewardResult, judge_rewards, reward_table
from services.trainer.evaluation.sampling import Response, bounded_by_context, sample_responses
from services.trainer.evaluation.teacher_places import TeacherPlace, check_vocabulary, find_teachers
from services.trainer.memory import FOR_COMMAND, memory_errors
from services.trainer.prompts import PromptProblem, TokenizedPrompt
from services.trainer.rollout.base import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySettings:
    """What both studies are told."""

    student: str
    data: str
    sampling: SamplingParams
    num_samples: int
    loading: Loading
    template: str | None = None
    split: str = "train"
    max_problems: int | None = None
    cache_folder: Path | None = None
    output: Path | None = None
    """JSON."""
    figure: Path | None = None
    """PNG."""

    def problems(self) -> tuple[str, list[PromptProblem]]:
        """The set's label and its problems."""
        sets = open_problems(
            [self.data], template=self.template, split=self.split, max_problems=self.max_problems
        )  # fmt: skip
        return next(iter(sets.items()))


@memory_errors(FOR_COMMAND)
def continuation_command(
    settings: StudySettings, teacher: str, *, depths: Sequence[int], num_continuations: int, console: Console
) -> dict[str, Any]:
    """Makes the study of 6.1, prints it, returns (and writes) the JSON result."""
    data, problems = settings.problems()
    names = labels([settings.student, teacher])
    student, continuing = (
        open_model(path, settings.loading, label=name)
        for path, name in zip((settings.student, teacher), names, strict=True)
    )
    check_vocabulary(student.loaded, names[0], continuing.loaded.vocabulary, names[1])
    result = run_continuation(
        student.evaluated,
        continuing.evaluated,
        student.tokenize(problems),
        data=data,
        depths=depths,
        sampling=settings.sampling,
        num_samples=settings.num_samples,
        num_continuations=num_continuations,
        cache_folder=settings.cache_folder,
        console=console,
    )
    console.print(continuation_table(result))
    for line in continuation_lines(result):
        console.print(line, highlight=False)
    if settings.figure is not None:
        draw_continuation(result, settings.figure)
    report = as_plain_json(result)
    if settings.output is not None:
        write_json(settings.output, report)
    return report


@memory_errors(FOR_COMMAND)
def auroc_command(
    settings: StudySettings,
    teachers: Sequence[str],
    *,
    tenant: str = "default",
    credentials: Credentials | None = None,
    console: Console,
) -> dict[str, Any]:
    """Makes the study of 6.2, prints it, returns (and writes) the JSON result."""
    if not teachers:
        raise ConfigError("teacher: is missing; give a model folder or URL#POOL, once or more")
    data, problems = settings.problems()
    with ExitStack() as opened:
        student = open_model(settings.student, settings.loading, label=labels([settings.student])[0])
        places = find_teachers(
            list(dict.fromkeys(teachers)), student.loaded, student.evaluated.name, tenant, credentials, opened
        )
        rollouts = _rollouts(settings, student, student.tokenize(problems), console)
        results = _judge(settings, student, rollouts, places, console)
    title = f"rewards of {student.evaluated.name} on {data}"
    num_correct = sum(rollouts.is_correct)
    console.print(reward_table(results, num_correct, len(rollouts.is_correct) - num_correct, title))
    console.print(NO_EVIDENCE, highlight=False)
    if settings.figure is not None:
        draw_rewards(results, rollouts.is_correct, student.evaluated.name, settings.figure)
    report = _report(data, student, rollouts, results)
    if settings.output is not None:
        write_json(settings.output, report)
    return report


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rollouts:
    """The student's, flat in the order of problems and samples where a list says nothing else."""

    prompts: list[TokenizedPrompt]
    responses: list[list[Response]]
    is_correct: list[bool]
    sampling: SamplingParams


def _rollouts(
    settings: StudySettings, student: OpenedModel, prompts: list[TokenizedPrompt], console: Console
) -> _Rollouts:
    check_gradable(prompts, settings.num_samples)
    token_ids = [prompt.prompt_token_ids for prompt in prompts]
    sampling = bounded_by_context(settings.sampling, token_ids, student.evaluated.engine.max_context)
    responses = sample_responses(
        student.evaluated, token_ids, sampling=sampling, num_samples=settings.num_samples,
        cache_folder=settings.cache_folder, console=console,
    )  # fmt: skip
    is_correct = [grade_response(prompts[one.problem], one).is_correct for part in responses for one in part]
    return _Rollouts(prompts=prompts, responses=responses, is_correct=is_correct, sampling=sampling)


def _judge(
    settings: StudySettings,
    student: OpenedModel,
    rollouts: _Rollouts,
    places: Sequence[TeacherPlace],
    console: Console,
) -> list[RewardResult]:
    token_ids = [prompt.prompt_token_ids for prompt in rollouts.prompts]
    sampled = student.evaluated.fingerprint, rollouts.sampling

    def mean_logprobs(source: Any) -> np.ndarray:
        found = read_mean_logprobs(
            source, token_ids, rollouts.responses, sampled=sampled, cache_folder=settings.cache_folder, console=console
        )
        return np.array([value for part in found for value in part])

    # Greedy sampling has no distribution of its own; log-probs are then at temperature 1, as the engine records them.
    temperature = rollouts.sampling.temperature or 1.0
    own = LocalSource(student.loaded, name=student.evaluated.name, temperature=temperature)
    student_R = mean_logprobs(own)
    problems = [one.problem for part in rollouts.responses for one in part]
    results = []
    for place in places:
        source = place.open(settings.loading)
        rewards_R = mean_logprobs(source) - student_R
        results.append(
            judge_rewards(
                source.name,
                source.fingerprint,
                rewards_R.tolist(),
                rollouts.is_correct,
                problems,
                seed=rollouts.sampling.seed,
            )
        )
    return results


def _report(data: str, student: OpenedModel, rollouts: _Rollouts, results: Sequence[RewardResult]) -> dict[str, Any]:
    flat = [one for part in rollouts.responses for one in part]
    return {
        "student": student.evaluated.name,
        "fingerprint": student.evaluated.fingerprint,
        "data": data,
        "sampling": asdict(rollouts.sampling),
        "num_problems": len(rollouts.prompts),
        "num_rollouts": len(flat),
        "num_correct": sum(rollouts.is_correct),
        "num_truncated": sum(one.is_truncated for one in flat),
        "note": NO_EVIDENCE,
        "is_correct": rollouts.is_correct,
        "problems": [one.problem for one in flat],
        "teachers": [as_plain_json(result) for result in results],
    }
