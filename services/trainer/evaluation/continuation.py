"""Teacher continuation (section 6.1 of the paper): is the teacher still better where the student has already been?

The student answers in full; where its response is longer than the largest depth, the teacher goes on from the student's
first d tokens, with the same total length limit. gain(d) = acc(teacher from depth d) - acc(student's own response),
over the same rollouts at every depth, so that the depths differ in nothing but the prefix.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from opd.errors import ConfigError
from services.trainer.evaluation.estimates import Estimate, means_over_rollouts
from services.trainer.evaluation.evaluation import check_gradable, grade_response
from services.trainer.evaluation.results import plain_table
from services.trainer.evaluation.sampling import EvaluatedModel, Response, bounded_by_context, sample_responses
from services.trainer.prompts import TokenizedPrompt
from services.trainer.rollout.base import SamplingParams, derive_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthResult:
    """What became of the rollouts when the teacher took over after `depth` tokens."""

    depth: int
    """0 means that the teacher answered alone."""
    accuracy: Estimate
    gain: Estimate
    """`accuracy` minus the student's own on the same rollouts."""
    truncated: float
    """Share of continuations cut off by the length limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinuationResult:
    """Gains by depth; every interval resamples problems."""

    student: str
    teacher: str
    data: str
    sampling: dict[str, float | int]
    num_problems: int
    num_rollouts: int
    """Sampled from the student."""
    num_selected: int
    """Rollouts longer than the largest depth: those that count."""
    num_selected_problems: int
    num_continuations: int
    """Of every prefix."""
    student_accuracy: Estimate
    """Of the selected rollouts."""
    depths: tuple[DepthResult, ...]
    decline: Estimate | None
    """gain(smallest depth) - gain(largest depth), paired; None with a single depth."""


def run_continuation(
    student: EvaluatedModel,
    teacher: EvaluatedModel,
    prompts: Sequence[TokenizedPrompt],
    *,
    data: str,
    depths: Sequence[int],
    sampling: SamplingParams,
    num_samples: int,
    num_continuations: int = 1,
    cache_folder: Path | None = None,
    console: Console | None = None,
) -> ContinuationResult:
    """Samples `num_samples` rollouts a problem and `num_continuations` of each prefix; what the cache has is not.

    The teacher sees the student's prompt ids, so both must share a vocabulary. Raises `ConfigError` for problems that
    cannot be graded, depths that cannot be, and where no rollout is long enough.
    """
    check_gradable(prompts, num_samples)
    token_ids = [prompt.prompt_token_ids for prompt in prompts]
    max_context = min(student.engine.max_context, teacher.engine.max_context)
    bounded = bounded_by_context(sampling, token_ids, max_context)
    ordered = _checked_depths(depths, num_continuations, bounded)
    responses = sample_responses(
        student, token_ids, sampling=bounded, num_samples=num_samples, cache_folder=cache_folder, console=console
    )
    selected = _long_enough(responses, ordered[-1])
    own_R = np.array([grade_response(prompts[one.problem], one).is_correct for one in selected], np.float64)
    found = [
        _continue(teacher, prompts, selected, depth, bounded, num_continuations, cache_folder, console)
        for depth in ordered
    ]
    columns = _columns(own_R, found, [one.problem for one in selected], bounded.seed)
    return ContinuationResult(
        student=student.name,
        teacher=teacher.name,
        data=data,
        sampling=asdict(bounded),
        num_problems=len(prompts),
        num_rollouts=len(prompts) * num_samples,
        num_selected=len(selected),
        num_selected_problems=len({one.problem for one in selected}),
        num_continuations=num_continuations,
        student_accuracy=columns.own,
        depths=tuple(
            DepthResult(depth=depth, accuracy=accuracy, gain=gain, truncated=outcome.truncated)
            for depth, accuracy, gain, outcome in zip(ordered, columns.accuracies, columns.gains, found, strict=True)
        ),
        decline=columns.decline if len(ordered) > 1 else None,
    )


def _checked_depths(depths: Sequence[int], num_continuations: int, sampling: SamplingParams) -> list[int]:
    ordered = sorted(set(depths))
    if not ordered or ordered[0] < 0 or ordered[-1] >= sampling.max_response_tokens:
        raise ConfigError(
            f"depths: {', '.join(map(str, depths)) or 'none'}; give token counts from 0 to below the longest response "
            f"({sampling.max_response_tokens} tokens)"
        )
    if num_continuations < 1:
        raise ConfigError(f"num_continuations: {num_continuations} is too small; give 1 or more")
    return ordered


def _long_enough(responses: Sequence[Sequence[Response]], depth: int) -> list[Response]:
    flat = [response for part in responses for response in part]
    selected = [response for response in flat if len(response.token_ids) > depth]
    if not selected:
        longest = max(len(response.token_ids) for response in flat)
        raise ConfigError(
            f"depths: no rollout is longer than {depth} tokens (the longest has {longest}); give smaller depths or "
            "harder problems"
        )
    return selected


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    correct_R: NDArray[np.float64]
    """Share of right continuations of each selected rollout."""
    truncated: float


def _continue(
    teacher: EvaluatedModel,
    prompts: Sequence[TokenizedPrompt],
    selected: Sequence[Response],
    depth: int,
    sampling: SamplingParams,
    num_continuations: int,
    cache_folder: Path | None,
    console: Console | None,
) -> _Outcome:
    """Lets the teacher go on and grades prefix and continuation as one response: the answer may stand in either."""
    continued = sample_responses(
        teacher,
        [np.concatenate([prompts[one.problem].prompt_token_ids, one.token_ids[:depth]]) for one in selected],
        # Another seed than the student's, whose own choices would be made again otherwise.
        sampling=replace(
            sampling,
            max_response_tokens=sampling.max_response_tokens - depth,
            seed=derive_seed(sampling.seed, "continuation", depth),
        ),
        num_samples=num_continuations,
        cache_folder=cache_folder,
        console=console,
        description=f"{teacher.name} from {depth}",
    )
    shares = []
    for origin, continuations in zip(selected, continued, strict=True):
        prefix = origin.token_ids[:depth].tolist()
        whole = [replace(one, text=teacher.decode([*prefix, *one.text_token_ids])) for one in continuations]
        verdicts = [grade_response(prompts[origin.problem], one).is_correct for one in whole]
        shares.append(sum(verdicts) / len(verdicts))
    truncated = np.mean([one.is_truncated for continuations in continued for one in continuations])
    return _Outcome(correct_R=np.array(shares, np.float64), truncated=float(truncated))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Columns:
    own: Estimate
    decline: Estimate
    accuracies: list[Estimate]
    gains: list[Estimate]


def _columns(own_R: NDArray[np.float64], found: Sequence[_Outcome], problem_R: Sequence[int], seed: int) -> _Columns:
    """All estimates from the same resamples, so that differences between depths are paired."""
    accuracies_RD = np.stack([outcome.correct_R for outcome in found], axis=1)
    gains_RD = accuracies_RD - own_R[:, None]
    decline_R1 = gains_RD[:, :1] - gains_RD[:, -1:]
    columns_RC = np.concatenate([own_R[:, None], decline_R1, accuracies_RD, gains_RD], axis=1)
    own, decline, *others = means_over_rollouts(columns_RC, problem_R, seed=seed)
    return _Columns(own=own, decline=decline, accuracies=others[: len(found)], gains=others[len(found) :])


def continuation_table(result: ContinuationResult) -> Table:
    """Fits a terminal of 80 columns."""
    title = f"{result.teacher} goes on from prefixes of {result.student} on {result.data}"
    table = plain_table(title, "prefix", ("rollouts", "student", "teacher", "95 %", "gain", "95 %", "cut off"))
    for one in result.depths:
        table.add_row(
            str(one.depth),
            str(result.num_selected),
            f"{result.student_accuracy.value:.1%}",
            f"{one.accuracy.value:.1%}",
            f"{100 * one.accuracy.low:.0f}-{100 * one.accuracy.high:.0f}",
            f"{one.gain.value:+.3f}",
            f"{one.gain.low:+.3f} {one.gain.high:+.3f}",
            f"{one.truncated:.0%}",
        )
    return table


def continuation_lines(result: ContinuationResult) -> list[str]:
    """What the table does not say: which rollouts these are, and whether the gain falls with depth."""
    lines = [
        f"{result.num_selected} of {result.num_rollouts} rollouts are longer than {result.depths[-1].depth} tokens, of "
        f"{result.num_selected_problems} of {result.num_problems} problems; intervals resample problems"
    ]
    if result.decline is not None:
        first, last, decline = result.depths[0], result.depths[-1], result.decline
        verdict = "cannot be told from these rollouts"
        if decline.low > 0:
            verdict = "holds here"
        elif decline.high < 0:
            verdict = "does not hold here: it rises"
        lines.append(
            f"gain at {first.depth} minus gain at {last.depth}: {decline.value:+.3f} ({decline.low:+.3f} to "
            f"{decline.high:+.3f}); that it falls with depth (paper, 6.1) {verdict}"
        )
    return lines
