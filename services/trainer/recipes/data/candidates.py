"""Rows on their way to the output, and the record of each that is dropped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from services.trainer.prompts import PromptProblem, load_problems, retemplate
from services.trainer.prompts.problems import load_rows

OnRead = Callable[[str], None]


class DropReason(StrEnum):
    """Why a row is not in the output."""

    EXACT_WITHIN = "exact_within"
    """Its question occurred before in the sources."""
    EXACT_AGAINST = "exact_against"
    """Its question occurs in the sets to compare with."""
    SEMANTIC_WITHIN = "semantic_within"
    """It is near an earlier question that was kept."""
    SEMANTIC_AGAINST = "semantic_against"
    """It is near a question of the sets to compare with."""
    TOO_LONG = "too_long"
    """Its prompt has more tokens than allowed."""
    NOT_DRAWN = "not_drawn"
    """The mix has its share of this source already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One row and what was read of it.

    Example: ``Candidate(source="deepmath", file="DeepMath.parquet", problem=PromptProblem(...), row={...})``.
    """

    source: str
    """Name of the source in the configuration, or `against`."""
    file: str
    problem: PromptProblem
    row: Mapping[str, Any]
    """As it was in the file."""

    @property
    def question(self) -> str:
        return self.problem.question

    def rendered(self) -> dict[str, Any]:
        """The row as it is written: its own columns, with the messages as they are asked now."""
        # Columns in double underscores are what a data-frame library left of its own index.
        kept = {name: value for name, value in self.row.items() if not name.startswith("__")}
        return kept | {"prompt": [dict(message) for message in self.problem.messages]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """One row that is not in the output, and what it gave way to."""

    candidate: Candidate
    reason: DropReason
    partner: Candidate | None = None
    similarity: float | None = None
    """Cosine to the partner; None where none was taken."""
    num_tokens: int | None = None
    """Of the prompt, where that was the reason."""


def load_candidates(source: str, files: Sequence[str], split: str, on_read: OnRead) -> list[Candidate]:
    """Every row of the files in order; `ConfigError` names file, row and column."""
    found = []
    for file in files:
        on_read(file)
        pairs = zip(load_problems(file, split=split), load_rows(file, split=split), strict=True)
        name = Path(file).name
        found += [Candidate(source=source, file=name, problem=problem, row=row) for problem, row in pairs]
    return found


def in_template(candidate: Candidate, template: str) -> Candidate:
    """The same question asked in another template."""
    return replace(candidate, problem=retemplate(candidate.problem, template))
