"""What a run leaves behind for people and tools to read: one folder with plain JSON in it.

`config.json` is the resolved configuration, `metrics.jsonl` one object per optimizer step with `area/name` keys,
`events.jsonl` what happened besides (start, warnings, checkpoints, end), `train_summary.json` the run in one object. A
number that does not exist is an absent key. Lines are flushed as they are written; after a resume, the records of steps
that will be taken again are dropped first, while events stay: what a resume went back behind is no longer so.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.errors import CheckpointError
from opd.files import whole_file

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SUMMARY_FILE = "train_summary.json"
EVALUATIONS = "evaluations"
_SUMMARY_STEPS = 3


class RunLog:
    """Writes the files of one run folder. `CheckpointError` when the disk refuses."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def create(self, config: Mapping[str, Any]) -> None:
        """Makes the folder and writes the configuration."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _refused(self.run_dir, error) from error
        self._replace(CONFIG_FILE, config)
        self._cut_torn_event()

    def has_run(self) -> bool:
        """Whether an earlier run has written steps here."""
        path = self.run_dir / METRICS_FILE
        return path.is_file() and path.stat().st_size > 0

    def write_step(
        self, step: int, metrics: Mapping[str, float], arrays: Mapping[str, Sequence[float]]
    ) -> dict[str, Any]:
        """Appends one step, counted from 1, and returns the record.

        A metric that is not finite is left out, an array's element is null.
        """
        record = _step_record(step, metrics, arrays)
        self._append(METRICS_FILE, record)
        return record

    def write_event(self, kind: str, **fields: Any) -> None:
        self._append(EVENTS_FILE, {"time": time.time(), "event": kind} | fields)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._replace(SUMMARY_FILE, summary)

    def write_evaluation(self, name: str, result: Mapping[str, Any]) -> None:
        """One evaluation in a file of its own, `evaluations/NAME.json`."""
        try:
            (self.run_dir / EVALUATIONS).mkdir(exist_ok=True)
        except OSError as error:
            raise _refused(self.run_dir / EVALUATIONS, error) from error
        self._replace(f"{EVALUATIONS}/{name}.json", result)

    def steps(self) -> list[dict[str, Any]]:
        """The records so far; a last line cut off by a crash is no record."""
        return read_steps(self.run_dir)

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Results by the step they were found after, the last of each step, without what a resume went back behind."""
        events = lasting_events(_whole_lines(self.run_dir / EVENTS_FILE))
        return {int(event["step"]): dict(event["results"]) for event in events if event.get("event") == "evaluation"}

    def drop_after(self, step: int) -> None:
        """Forgets the records of steps beyond `step`, which a resumed run takes again."""
        kept = [record for record in self.steps() if record["step"] <= step]
        self._write_atomically(METRICS_FILE, "".join(f"{json.dumps(record)}\n" for record in kept))

    def _cut_torn_event(self) -> None:
        """Takes away the beginning of a line that a crash cut off: the next event would become part of it."""
        path = self.run_dir / EVENTS_FILE
        try:
            if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
                os.truncate(path, content.rfind(b"\n") + 1)
        except OSError as error:
            raise _refused(path, error) from error

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        try:
            with (self.run_dir / name).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise _refused(self.run_dir / name, error) from error

    def _replace(self, name: str, content: Mapping[str, Any]) -> None:
        self._write_atomically(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def _write_atomically(self, name: str, text: str) -> None:
        path = self.run_dir / name
        try:
            with whole_file(path) as partial:
                partial.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _refused(path, error) from error


def _step_record(step: int, metrics: Mapping[str, float], arrays: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    scalars = {name: value for name, value in metrics.items() if math.isfinite(value)}
    columns = {name: [value if math.isfinite(value) else None for value in values] for name, values in arrays.items()}
    return {"step": step, "time": time.time()} | scalars | columns


def read_steps(run_dir: Path) -> list[dict[str, Any]]:
    """Every whole record of `metrics.jsonl`; none when there is no such file."""
    return list(_whole_lines(run_dir / METRICS_FILE))


def lasting_events(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of a run without what lies beyond the step that a later resume went back to."""
    lasting: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("event") == "resume":
            lasting = [earlier for earlier in lasting if earlier.get("step", 0) <= event["step"]]
        lasting.append(event)
    return lasting


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            # A process died while it wrote this line; its step is not in any checkpoint either.
            continue


def first_and_last(records: Sequence[Mapping[str, Any]], name: str) -> tuple[float | None, float | None]:
    """Mean of a metric over the first and over the last three steps that have it; None when none has."""
    values = [float(record[name]) for record in records if name in record]
    if not values:
        return None, None
    first, last = values[:_SUMMARY_STEPS], values[-_SUMMARY_STEPS:]
    return sum(first) / len(first), sum(last) / len(last)


def _refused(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be written ({error.strerror}); free space there or choose another run_dir")
