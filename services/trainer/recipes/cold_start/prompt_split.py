"""Which prompts the teacher answers for the cold start, and which are left for distillation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd.errors import ConfigError
from services.trainer.prompts import PromptProblem
from services.trainer.recipes.cold_start.config import ColdStartDataSettings
from services.trainer.recipes.data.candidates import Candidate, in_template, load_candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSplit:
    """Both parts in the order of the files."""

    cold_start: tuple[PromptProblem, ...]
    remaining: tuple[Mapping[str, Any], ...]
    """Whole rows, as `data.files` of a training run takes them."""
    num_rows: int
    num_duplicates: int
    """Rows whose question a cold-start prompt has too: in neither part, so that distillation sees new ones only."""


def split_prompts(data: ColdStartDataSettings, seed: int) -> PromptSplit:
    """Chosen by seed; every question once in the cold start. `ConfigError` when nothing would be left."""
    rows = load_candidates("prompts", data.files, data.split, lambda file: None)
    if data.template:
        rows = [in_template(row, data.template) for row in rows]
    first: dict[str, int] = {}
    for place, row in enumerate(rows):
        first.setdefault(row.question, place)
    num_chosen = data.num_prompts or round(len(first) * data.share)
    if not 1 <= num_chosen <= len(first):
        raise ConfigError(
            f"data: {num_chosen} prompts for the cold start of {len(first)} distinct ones; change num_prompts or share"
        )
    places = sorted(first.values())
    chosen = sorted(places[index] for index in np.random.default_rng([seed, 2]).permutation(len(places))[:num_chosen])
    taken = {rows[place].question for place in chosen}
    remaining = [row for row in rows if row.question not in taken]
    return PromptSplit(
        cold_start=tuple(rows[place].problem for place in chosen),
        remaining=tuple(_rendered(remaining)),
        num_rows=len(rows),
        num_duplicates=len(rows) - len(chosen) - len(remaining),
    )


def _rendered(rows: Sequence[Candidate]) -> list[Mapping[str, Any]]:
    return [row.rendered() for row in rows]
