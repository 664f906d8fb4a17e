"""A run as the report sees it: series over steps, arrays by position, and the scalars of its summary.

`metrics.jsonl` has one object per step; only finite numbers make a series. A step that was taken twice, because a run
was resumed, counts with its later record. A last line without its end is a step that was never finished.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from opd.errors import ConfigError

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILES = ("train_summary.json", "summary.json")

Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One metric of one run."""

    steps: list[int]
    values: list[float]

    @property
    def first(self) -> float:
        return self.values[0]

    @property
    def last(self) -> float:
        return self.values[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run folder, its records in step order."""

    name: str
    records: list[Record]
    summary: Record

    def series(self, key: str) -> Series | None:
        """The finite numbers under `key`; None if there is not one."""
        found = [(record["step"], record[key]) for record in self.records if _is_number(record.get(key))]
        if not found:
            return None
        return Series(steps=[step for step, _ in found], values=[float(value) for _, value in found])

    def keys(self, area: str) -> list[str]:
        """Every key of an area that holds a number in some step, in the order the run wrote them."""
        found = {key: None for record in self.records for key, value in record.items() if _is_number(value)}
        return [key for key in found if key.startswith(f"{area}/")]

    def arrays(self, key: str) -> list[Record]:
        """The records that hold an array under `key`."""
        return [record for record in self.records if isinstance(record.get(key), list)]


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Reads every folder; equal folder names are told apart by their parents' names."""
    if not run_dirs:
        raise ConfigError("no run to report on: name at least one run folder")
    names = [folder.resolve().name for folder in run_dirs]
    runs = []
    for folder, name in zip(run_dirs, names, strict=True):
        if names.count(name) > 1:
            name = f"{folder.resolve().parent.name}/{name}"
        runs.append(Run(name=name, records=_read_records(folder / METRICS_FILE), summary=_read_summary(folder)))
    return runs


def _read_records(path: Path) -> list[Record]:
    lines = _text_of(path).split("\n")
    by_step: dict[int, Record] = {}
    # What follows the last line end is empty, or a record that was being written when the process ended.
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        record = _parsed(line, f"{path}:{number}")
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise ConfigError(f'{path}:{number}: "step" is {step!r}, not a whole number; repair or remove the line')
        by_step[step] = record
    if not by_step:
        raise ConfigError(f"{path}: has no finished step yet; let the run take one")
    return [by_step[step] for step in sorted(by_step)]


def _read_summary(folder: Path) -> Record:
    summary: Record = {}
    for name in SUMMARY_FILES:
        path = folder / name
        if path.is_file():
            summary |= _parsed(_text_of(path), str(path))
    return summary


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name the folder of a run") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text (byte {error.start}); name the folder of a run") from error


def _parsed(text: str, where: str) -> Record:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: is not JSON ({error.msg}); repair or remove it") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: is a {type(record).__name__}, not a JSON object; repair or remove it")
    return record


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
