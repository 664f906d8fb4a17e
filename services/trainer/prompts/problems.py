"""Prompt sets: files and data sets in the form of the paper's.

A row has `prompt` (messages of role and content), `reward_model.ground_truth`, `data_source` and `extra_info`. The
template in which a question is asked is recognised, and another can be put in its place. Whatever is wrong with a row
is a `ConfigError` that names file, row and column.
"""

import json
import logging
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from opd.errors import ConfigError, first_line
from services.trainer.hub import check_hub, looks_like_a_path
from services.trainer.templates import get_template, recognize

logger = logging.getLogger(__name__)

Rows: TypeAlias = Generator[Mapping[str, Any], None, None]
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptProblem:
    """One row of a prompt set.

    Example: ``PromptProblem(index=0, messages=({"role": "user", "content": "What is 2+2? Please ..."},),
    question="What is 2+2?", template="boxed", answer="4", source="testbed/level1", level="1")``.
    """

    index: int
    """Of the row in its file, from 0."""
    messages: tuple[Mapping[str, str], ...]
    question: str
    """The last user message without its template; the whole message where none was recognised."""
    template: str
    """Name of the template the question is asked in; empty where none was recognised."""
    answer: str | None
    source: str
    """`data_source`, or the file's name where the row has none."""
    level: str
    """`extra_info.level`; empty where the row has none."""
    teacher: str = ""
    """Name of the teacher that scores it; empty where the run has a single one."""
    context: str = ""
    """What only the teacher may read of the row, such as a worked solution; empty where no column was named."""

    @property
    def name(self) -> str:
        """What an error calls it."""
        return f"prompt {self.index} of {self.source}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherColumn:
    """Where a row says who teaches it. Example: ``TeacherColumn(name="teacher", teachers=("math", "code"))``."""

    name: str
    teachers: Collection[str]
    """The names that may stand there."""


def load_problems(
    data: str,
    *,
    template: str | None = None,
    split: str = "train",
    teacher_column: TeacherColumn | None = None,
    context_column: str | None = None,
) -> list[PromptProblem]:
    """Reads a .parquet or .jsonl file, or a split of a Hugging Face data set by name.

    `template` asks every question in that template instead of its own; a prompt in no known template is then taken
    for a bare question. With `teacher_column` every row has to name one of its teachers. Raises `ConfigError` naming
    file, row and column.
    """
    # A bad row ends the reading, which must not leave its file open.
    with closing(_rows(data, split)) as rows:
        problems = [_problem(row, index, data, teacher_column, context_column) for index, row in enumerate(rows)]
    if not problems:
        raise ConfigError(f"data {data}: it has no rows; give a prompt set with at least one")
    if template is None:
        return problems
    num_bare = sum(not problem.template for problem in problems)
    if num_bare:
        logger.warning("%s: %d of %d prompts are taken for bare questions", data, num_bare, len(problems))
    return [retemplate(problem, template) for problem in problems]


def load_rows(data: str, *, split: str = "train") -> list[Mapping[str, Any]]:
    """The rows as they are in the file, unchecked and in the order of `load_problems`."""
    with closing(_rows(data, split)) as rows:
        return list(rows)


def retemplate(problem: PromptProblem, template: str) -> PromptProblem:
    """The same question asked in another template; `ConfigError` for an unknown one."""
    last = {**problem.messages[-1], "content": get_template(template).render(problem.question)}
    return replace(problem, template=template, messages=(*problem.messages[:-1], last))


def _rows(data: str, split: str) -> Rows:
    path = Path(data)
    if path.suffix in (".parquet", ".jsonl"):
        if not path.is_file():
            raise ConfigError(f"data {data}: no such file; give a .parquet or .jsonl file or a data set name")
        return _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
    if path.exists() or looks_like_a_path(data):
        found = "not a prompt set" if path.exists() else "no such file"
        raise ConfigError(f"data {data}: {found}; give a .parquet or .jsonl file or a data set name")
    return _dataset_rows(data, split)


def _parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"data {path}: not a readable parquet file ({first_line(error)}); copy it again") from error


def _jsonl_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ConfigError(f"data {path}: line {number} is not JSON ({error}); one object a line") from error


def _dataset_rows(name: str, split: str) -> Rows:
    import datasets

    is_cached = (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
    check_hub("data", name, is_cached=is_cached or Path(name).is_dir())
    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # The library raises many kinds, from a missing split to no network.
        raise ConfigError(
            f"data {name}: split {split!r} cannot be loaded ({first_line(error)}); give a .parquet or .jsonl file or "
            "a data set name"
        ) from error
    yield from loaded


def _problem(
    row: Mapping[str, Any],
    index: int,
    data: str,
    teacher_column: TeacherColumn | None,
    context_column: str | None,
) -> PromptProblem:
    if not isinstance(row, Mapping):
        raise ConfigError(f"data {data}: row {index} is not an object; give prompt, reward_model and data_source")
    messages = _messages(row.get("prompt"), index, data)
    extra = row.get("extra_info")
    extra = extra if isinstance(extra, Mapping) else {}
    content = messages[-1]["content"]
    template, question = recognize(content) or ("", content)
    level = extra.get("level")
    return PromptProblem(
        index=index,
        messages=messages,
        question=question,
        template=template,
        answer=_answer(row, index, data),
        source=str(row.get("data_source") or Path(data).stem),
        level="" if level is None else str(level),
        teacher="" if teacher_column is None else _teacher(row, index, data, teacher_column),
        context="" if context_column is None else _context(row, index, data, context_column),
    )


def _context(row: Mapping[str, Any], index: int, data: str, column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        found = "missing" if text is None else f"{text!r:.40}"
        raise ConfigError(
            f"data {data}: row {index}: column {column} is {found}; give the text that the teacher alone is to read"
        )
    return text


def _teacher(row: Mapping[str, Any], index: int, data: str, column: TeacherColumn) -> str:
    name = row.get(column.name)
    if not isinstance(name, str) or name not in column.teachers:
        found = "missing" if name is None else f"{name!r:.40}"
        raise ConfigError(
            f"data {data}: row {index}: column {column.name} is {found}; give one of the configured teachers: "
            f"{', '.join(sorted(column.teachers))}"
        )
    return name


def _messages(prompt: Any, index: int, data: str) -> tuple[Mapping[str, str], ...]:
    where = f"data {data}: row {index}: column prompt"
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or not prompt:
        found = "missing" if prompt is None else f"{prompt!r:.40}"
        raise ConfigError(f"{where} is {found}; give a list of messages with role and content")
    messages = []
    for message in prompt:
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise ConfigError(f"{where} has the message {message!r:.60}; give role ({', '.join(_ROLES)}) and content")
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise ConfigError(f"{where} has an empty {message['role']} message; remove the row or give it a content")
        messages.append({"role": message["role"], "content": content})
    if messages[-1]["role"] != "user":
        raise ConfigError(f"{where} ends with a message of the {messages[-1]['role']}; the last one must be the user's")
    return tuple(messages)


def _answer(row: Mapping[str, Any], index: int, data: str) -> str | None:
    reward_model = row.get("reward_model")
    if reward_model is None:
        return None
    if not isinstance(reward_model, Mapping):
        raise ConfigError(
            f"data {data}: row {index}: column reward_model is {reward_model!r:.40}; give an object with ground_truth"
        )
    answer = reward_model.get("ground_truth")
    return None if answer is None or str(answer) == "" else str(answer)
