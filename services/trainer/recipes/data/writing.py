"""Rows to a parquet or JSON-lines file: the same rows give the same bytes, and a file with its final name is whole."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opd.errors import ConfigError
from opd.files import whole_file

Row = Mapping[str, Any]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """By the suffix of `path`; `ConfigError` when it cannot be written, or its form cannot hold a column."""
    if path.suffix != ".parquet":
        check_json(rows, str(path), "write .parquet")
    with _writable(path) as partial:
        if path.suffix == ".parquet":
            _write_parquet(partial, rows)
        else:
            partial.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


def check_json(rows: Sequence[Row], where: str, way_out: str) -> None:
    """`ConfigError` naming the first column with a value that JSON cannot hold, such as a time, bytes or a decimal."""
    for row in rows:
        for name, value in row.items():
            try:
                json.dumps(value)
            except TypeError as error:
                reason = str(error).removeprefix("Object of ")
                raise ConfigError(f"{where}: column {name!r} does not fit JSON lines ({reason}); {way_out}") from error


def write_text(path: Path, text: str) -> None:
    """Likewise."""
    with _writable(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def _writable(path: Path) -> Iterator[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            yield partial
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); give a file that can be written") from error


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.Table.from_pylist(harmonize(rows))
        pyarrow.parquet.write_table(table, path)
    except pyarrow.ArrowException as error:
        reason = str(error).split("\n")[0][:160]
        raise ConfigError(f"{path}: the sources' columns do not fit together ({reason}); write .jsonl") from error


def harmonize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One set of columns for rows of several sources, absent ones None.

    A plain value that is a string in one source and a number in another (ids are) becomes a string. A column of
    objects is treated alike.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    return [{name: columns[name][index] for name in names} for index in range(len(rows))]


def _column(values: list[Any]) -> list[Any]:
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, Mapping) for value in present):
        parts = harmonize(present)
        inner = iter(parts)
        return [None if value is None else next(inner) for value in values]
    kinds = {type(value) for value in present}
    if _is_plain(present) and len(kinds) > 1 and kinds != {int, float}:
        return [None if value is None else str(value) for value in values]
    return values


def _is_plain(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str | int | float | bool) for value in values)
