"""A run as the report sees it: series over steps, arrays by position, alarms, and the scalars of its summary.

`metrics.jsonl` has one object per step; only finite numbers make a series. A step that was taken twice, because a run
was resumed, counts with its later record, and alarms and evaluations that a resumed run went back behind are as if
they had never been. A last line without its end is a step that was never finished.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from opd.errors import ConfigError
from services.trainer.run_log import EVENTS_FILE, METRICS_FILE, lasting_events

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
class RunAlarm:
    """An alarm that was raised while the run trained."""

    number: int
    """Its name on the figures, counted over all runs of a report."""
    step: int
    name: str
    evidence: str
    remedy: str
    section: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run folder, its records in step order."""

    name: str
    records: list[Record]
    summary: Record
    alarms: list[RunAlarm] = field(default_factory=list)
    evaluations: dict[str, Series] = field(default_factory=dict)
    """By `evaluation/<what was measured>`, such as `evaluation/accuracy/heldout`."""

    def series(self, key: str) -> Series | None:
        """The finite numbers under `key`, a metric's or an evaluation's; None if there is not one."""
        if key in self.evaluations:
            return self.evaluations[key]
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
    runs: list[Run] = []
    for folder, name in zip(run_dirs, names, strict=True):
        if names.count(name) > 1:
            name = f"{folder.resolve().parent.name}/{name}"
        path = folder / EVENTS_FILE
        events = lasting_events(event for event, _ in (_lines(path) if path.is_file() else ()))
        run = Run(
            name=name,
            records=_read_records(folder / METRICS_FILE),
            summary=_read_summary(folder),
            alarms=_alarms(events, first_number=1 + sum(len(run.alarms) for run in runs)),
            evaluations=_evaluations(events),
        )
        runs.append(run)
    return runs


def _lines(path: Path) -> Iterator[tuple[Record, str]]:
    """Every whole line as an object, and where it stands."""
    # What follows the last line end is empty, or a record that was being written when the process ended.
    for number, line in enumerate(_text_of(path).split("\n")[:-1], start=1):
        if line.strip():
            yield _parsed(line, f"{path}:{number}"), f"{path}:{number}"


def _alarms(events: Sequence[Mapping[str, Any]], *, first_number: int) -> list[RunAlarm]:
    raised = [event for event in events if event.get("event") == "alarm"]
    texts = ("name", "evidence", "remedy", "section")
    return [
        RunAlarm(number=number, step=int(event["step"]), **{text: str(event.get(text, "")) for text in texts})
        for number, event in enumerate(raised, start=first_number)
    ]


def _evaluations(events: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    by_name: dict[str, dict[int, float]] = {}
    for event in events:
        if event.get("event") == "evaluation":
            for name, value in event["results"].items():
                by_name.setdefault(f"evaluation/{name}", {})[int(event["step"])] = float(value)
    return {
        name: Series(steps=sorted(values), values=[values[step] for step in sorted(values)])
        for name, values in by_name.items()
    }


def _read_records(path: Path) -> list[Record]:
    by_step: dict[int, Record] = {}
    for record, where in _lines(path):
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise ConfigError(f'{where}: "step" is {step!r}, not a whole number; repair or remove the line')
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
