"""What is measured of each prompt, kept in one file so that a preflight that was cut off goes on.

A record holds sums with their counts, never means, so that intervals over prompts can be drawn from it later. The
file's name carries a hash of everything that decides its content: other settings begin another file.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opd.errors import ConfigError

FORMAT = 1
"""Raised when records mean something else than before, so that older files are left alone."""

Sums = tuple[float, float]
"""Total and count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRecord:
    """What one teacher says of one prompt's rollouts."""

    metrics: Mapping[str, Sums]
    by_position: Mapping[str, tuple[list[float], list[float]]]
    """Totals and counts per bucket of positions."""
    rewards: list[float | None]
    """Mean log q - log p at the sampled tokens, one per rollout (6.2); None where they were not scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRecord:
    """One prompt in one way of asking it."""

    template: str
    prompt: int
    """Place among the drawn prompts."""
    is_correct: list[bool | None]
    """One per rollout of the student; None where no answer is known."""
    num_tokens: list[int]
    is_truncated: list[bool]
    teachers: Mapping[str, TeacherRecord]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerRecord:
    """How a model other than the student answers one prompt."""

    model: str
    """A teacher's name, or that of a pilot's run."""
    prompt: int
    is_correct: list[bool | None]
    num_tokens: list[int]


@dataclass(kw_only=True, slots=True)
class RecordFile:
    """Appends records and reads back what is there; `ConfigError` where the disk refuses."""

    path: Path
    prompts: dict[tuple[str, int], PromptRecord] = field(default_factory=dict)
    answers: dict[tuple[str, int], AnswerRecord] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any]) -> "RecordFile":
        """The file of this identity, with the records of an earlier start; a last line that was cut off is none."""
        told = json.dumps({"format": FORMAT} | dict(identity), sort_keys=True)
        digest = hashlib.sha256(told.encode()).hexdigest()[:16]
        file = cls(path=folder / f"records-{digest}.jsonl")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = file.path.read_text(encoding="utf-8") if file.path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                file.path.write_text(whole, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output_dir={folder}: cannot be used ({error.strerror}); give another folder") from error
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                file._keep(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"{file.path}: line {number} is no record; remove the file") from error
        return file

    def answers_of(self, model: str) -> list[AnswerRecord]:
        """By prompt."""
        return sorted((record for (name, _), record in self.answers.items() if name == model), key=lambda r: r.prompt)

    def prompts_in(self, template: str) -> list[PromptRecord]:
        """By prompt."""
        return sorted(
            (record for (name, _), record in self.prompts.items() if name == template), key=lambda r: r.prompt
        )

    def add(self, record: PromptRecord | AnswerRecord) -> None:
        kind = "prompt" if isinstance(record, PromptRecord) else "answer"
        line = {"kind": kind} | asdict(record)
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror}); free space there") from error
        self._keep(line)

    def _keep(self, line: dict[str, Any]) -> None:
        fields = {name: value for name, value in line.items() if name != "kind"}
        if line["kind"] == "answer":
            answer = AnswerRecord(**fields)
            self.answers[answer.model, answer.prompt] = answer
            return
        teachers = {name: TeacherRecord(**value) for name, value in fields.pop("teachers").items()}
        record = PromptRecord(**fields, teachers=teachers)
        self.prompts[record.template, record.prompt] = record
