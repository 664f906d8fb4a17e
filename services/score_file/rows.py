"""Rows of a .jsonl or .parquet file, one after the other, and what each is to the teacher.

A text is tokenized with the tokenizer given, a prompt through its chat template; a list of integers is taken as it is.
Whatever is wrong with a row's form is a `ConfigError` that names file, row and column.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd.errors import ConfigError, first_line
from opd.types import PAD_ID, Ids, ScoreRequest, TeacherInfo
from opd.wire.messages import content_key
from services.score_file.settings import Overlong, ScoreFileSettings

_BATCH_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class InputRow:
    """One row as it will be asked for; `reason` says why it will not be, or that it was cut."""

    index: int
    request: ScoreRequest
    key: bytes
    """Hash of content, wants and teacher: what makes a finished row known again."""
    status: str
    """`scored` or `truncated` once answered; `empty` or `too_long` are not asked for."""
    reason: str | None = None

    @property
    def is_asked(self) -> bool:
        return self.status in ("scored", "truncated")


def count_rows(path: Path) -> int:
    """Rows of the file, read as cheaply as its form allows; `ConfigError` for a file that is none of the two."""
    if path.suffix not in (".jsonl", ".parquet") or not path.is_file():
        raise ConfigError(f"{path}: no such .jsonl or .parquet file; give one with prompts and responses")
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            return sum(bool(line.strip()) for line in lines)
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: is no readable parquet file ({first_line(error)}); copy it again") from error


def raw_rows(path: Path, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    """Row by row: never more than a few in memory."""
    return _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path, columns)


def _jsonl_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}: line {number} is not JSON ({error}); one object a line") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}: line {number} is not an object; give one with prompt and response")
            yield row


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            present = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=present):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: is no readable parquet file ({first_line(error)}); copy it again") from error


class RowReader:
    """Makes requests of rows. `tokenizer` may be None where every row holds ids."""

    def __init__(self, settings: ScoreFileSettings, tokenizer: Any, info: TeacherInfo) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._info = info

    def read(self) -> Iterator[InputRow]:
        """Every row of the file in order."""
        settings = self._settings
        names = [settings.prompt_column, settings.response_column, settings.candidates_column]
        for index, row in enumerate(raw_rows(settings.source, [name for name in names if name])):
            yield self._row(index, row)

    def _row(self, index: int, row: Mapping[str, Any]) -> InputRow:
        settings = self._settings
        prompt = self._prompt(index, row.get(settings.prompt_column))
        response = self._response(index, row.get(settings.response_column))
        status, reason = self._judge(prompt.size, response.size)
        kept = response[: self._info.max_context - prompt.size] if status == "truncated" else response
        request = ScoreRequest(
            rollout_id=f"row.{index}",
            tenant=settings.tenant,
            teacher=settings.teacher,
            prompt_token_ids=prompt,
            response_token_ids=kept,
            candidate_token_ids=self._candidates(index, row, response.size, kept.size),
            score_top_k=settings.score_top_k,
            wants_entropy=settings.wants_entropy,
            teacher_temperature=settings.teacher_temperature,
            batch_invariant=settings.batch_invariant,
            timeout_ms=round(settings.timeout_s * 1000),
            teacher_fingerprint=self._info.fingerprint,
        )
        key = content_key(request, self._info.fingerprint)
        return InputRow(index=index, request=request, key=key, status=status, reason=reason)

    def _judge(self, num_prompt: int, num_response: int) -> tuple[str, str | None]:
        limit = self._info.max_context
        if not num_prompt or not num_response:
            return "empty", f"{'prompt' if not num_prompt else 'response'} has no token"
        if not limit or num_prompt + num_response <= limit:
            return "scored", None
        told = f"{num_prompt} + {num_response} tokens are above the teacher's context of {limit}"
        if self._settings.overlong is Overlong.TRUNCATE and num_prompt < limit:
            return "truncated", told
        return "too_long", told

    def _prompt(self, index: int, value: Any) -> Ids:
        if _is_ids(value):
            return np.array(value, np.int32)
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        where = self._where(index, self._settings.prompt_column)
        if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
            raise ConfigError(f"{where} is {value!r:.40}; give text, messages or token ids")
        tokenizer = self._need_tokenizer(where)
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # A chat template is a program and may fail in any way.
            raise ConfigError(f"{where}: the chat template refuses it ({first_line(error)}); change the row") from error
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def _response(self, index: int, value: Any) -> Ids:
        if _is_ids(value):
            return np.array(value, np.int32)
        where = self._where(index, self._settings.response_column)
        if not isinstance(value, str):
            raise ConfigError(f"{where} is {value!r:.40}; give text or token ids")
        return np.array(self._need_tokenizer(where)(value, add_special_tokens=False)["input_ids"], np.int32)

    def _candidates(self, index: int, row: Mapping[str, Any], num_rows: int, num_kept: int) -> Ids | None:
        """[R, K], shorter lists padded."""
        column = self._settings.candidates_column
        if column is None:
            return None
        lists = row.get(column)
        if not isinstance(lists, list) or len(lists) != num_rows or not all(_is_ids(ids) for ids in lists):
            raise ConfigError(f"{self._where(index, column)}: must hold a list of ids for each of {num_rows} tokens")
        width = max((len(ids) for ids in lists[:num_kept]), default=0)
        padded = [ids + [PAD_ID] * (width - len(ids)) for ids in lists[:num_kept]]
        return np.array(padded, np.int32).reshape(num_kept, width) if width else None

    def _need_tokenizer(self, where: str) -> Any:
        if self._tokenizer is None:
            raise ConfigError(f"{where} is text; give the teacher's tokenizer with --tokenizer")
        return self._tokenizer

    def _where(self, index: int, column: str) -> str:
        return f"{self._settings.source}: row {index}: column {column}"


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**31 for item in value)
