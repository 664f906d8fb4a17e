"""What a model card states: accuracy, entropy, forks, style shares and the rate of forgotten carries.

Everything is measured on the model's own samples on held-out problems; nothing is taken from training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from services.trainer.evaluation.grading import grade
from services.trainer.rollout.base import SamplingParams
from testbed.datasets import Item
from testbed.parsing import Reading, read
from testbed.sampling import Response, sample

TRAINING_SAMPLING = SamplingParams(max_response_tokens=192)
EVALUATION_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95, max_response_tokens=192)
LONG_MAX_TOKENS = 900
FORK_LIVE_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """A response with its problem's level and whether it states the right answer."""

    item: Item
    template: str
    response: Response
    is_correct: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Means over graded responses; rates are None where there was nothing to count."""

    num_samples: int
    accuracy: float
    accuracy_by_level: dict[str, float]
    accuracy_by_template: dict[str, float]
    truncated_share: float
    mean_response_tokens: float
    mean_entropy_nats: float
    max_live_tokens: int
    mean_live_tokens_at_forks: float | None
    wide_fork_share: float
    style_shares: dict[str, float]
    forgotten_carry_rate: float | None


def grade_samples(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: list[Item],
    templates: Iterable[str],
    sampling: SamplingParams,
    samples_each: int,
) -> list[Graded]:
    """Sample every item samples_each times, the templates taking turns, and grade."""
    names = tuple(templates)
    asked = [(item, names[turn % len(names)]) for turn in range(samples_each) for item in items]
    responses = sample(model, tokenizer, [item.prompt(template) for item, template in asked], sampling)
    return [
        Graded(
            item=item,
            template=template,
            response=response,
            is_correct=not response.truncated and grade(template, response.text, item.answer),
        )
        for (item, template), response in zip(asked, responses, strict=True)
    ]


def _by(graded: list[Graded], keys: Iterable[str]) -> dict[str, float]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for key, one in zip(keys, graded, strict=True):
        groups[key].append(one.is_correct)
    return {key: round(fmean(groups[key]), 4) for key in sorted(groups)}


def _styles(readings: list[Reading]) -> dict[str, float]:
    styles = [reading.style or "none" for reading in readings]
    return {style: round(styles.count(style) / len(styles), 4) for style in sorted(set(styles))}


def summarize(graded: list[Graded]) -> Summary:
    """Reduce graded responses; a fork is a position with more than one live token."""
    readings = [read(one.response.text) for one in graded]
    live = [count for one in graded for count in one.response.num_live]
    forks = [count for count in live if count > 1]
    num_carries = sum(reading.num_carries for reading in readings)
    num_forgotten = sum(reading.num_forgotten for reading in readings)
    return Summary(
        num_samples=len(graded),
        accuracy=round(fmean(one.is_correct for one in graded), 4),
        accuracy_by_level=_by(graded, (one.item.level for one in graded)),
        accuracy_by_template=_by(graded, (one.template for one in graded)),
        truncated_share=round(fmean(one.response.truncated for one in graded), 4),
        mean_response_tokens=round(fmean(one.response.num_tokens for one in graded), 2),
        mean_entropy_nats=round(fmean(value for one in graded for value in one.response.entropies), 4),
        max_live_tokens=max(live),
        mean_live_tokens_at_forks=round(fmean(forks), 3) if forks else None,
        wide_fork_share=round(fmean(count >= FORK_LIVE_TOKENS for count in live), 4),
        style_shares=_styles(readings),
        forgotten_carry_rate=round(num_forgotten / num_carries, 4) if num_carries else None,
    )
