"""The run itself: rows in, requests out, answers written down part by part, in the order of the file.

At most `max_in_flight` rows are asked for at a time, across the bounds of parts, and at most one part waits to be
written; nothing else of the file is in memory.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Protocol

from opd.errors import ConfigError, InternalError, OpdError
from opd.types import ScoreReply, ScoreRequest
from services.score_file.parts import PartStore
from services.score_file.rows import InputRow
from services.score_file.settings import ScoreFileSettings
from services.score_file.table import OutputRow

MAX_LISTED = 20


class Submitter(Protocol):
    """`opd.client.SyncScoreClient`."""

    def submit(self, request: ScoreRequest) -> Future[ScoreReply]: ...


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What came of the rows."""

    counts: Counter[str] = field(default_factory=Counter)
    """By status."""
    num_known: int = 0
    """Rows that an earlier run had finished."""
    listed: list[tuple[int, str, str]] = field(default_factory=list)
    """The first rows that are not plainly scored: row, status, reason."""

    def add(self, row: int, status: str, reason: str | None) -> None:
        self.counts[status] += 1
        if status != "scored" and len(self.listed) < MAX_LISTED:
            self.listed.append((row, status, reason or ""))


def score_rows(
    rows: Iterator[InputRow],
    client: Submitter,
    store: PartStore,
    settings: ScoreFileSettings,
    on_rows: Callable[[int], None],
) -> Outcome:
    """Scores what no earlier run has, joins the parts, and tells `on_rows` how many rows are done."""
    outcome = Outcome()
    unfinished = _skip_finished(rows, store, settings, outcome, on_rows)
    part: list[OutputRow] = []
    for item in _answers(unfinished, client, settings.max_in_flight):
        part.append(item)
        outcome.add(item.row.index, item.status, item.reason)
        if (item.row.index + 1) % settings.rows_per_part == 0:
            store.write(item.row.index // settings.rows_per_part, part)
            part = []
        on_rows(1)
    if part:
        store.write(part[-1].row.index // settings.rows_per_part, part)
    num_rows = outcome.counts.total()
    if not num_rows:
        raise ConfigError(f"{settings.source}: has no rows; give a file with prompts and responses")
    num_parts = -(-num_rows // settings.rows_per_part)
    if store.finished_keys(num_parts) is not None:
        raise _changed(settings, num_rows, "and those after it are gone since they were scored")
    if not store.is_finished:
        store.join(num_parts)
    return outcome


def _skip_finished(
    rows: Iterator[InputRow],
    store: PartStore,
    settings: ScoreFileSettings,
    outcome: Outcome,
    on_rows: Callable[[int], None],
) -> Iterator[InputRow]:
    """Rows of parts that have still to be scored; a finished part has to be of the very same rows."""
    for part, first in enumerate(iter(lambda: next(rows, None), None)):
        members = chain([first], islice(rows, settings.rows_per_part - 1))
        if store.finished_keys(part) is None:
            if store.is_finished:
                raise _changed(settings, first.index, "is not in the output")
            yield from members
            continue
        on_rows(_check_same(list(members), store, part, settings, outcome))


def _check_same(
    members: list[InputRow], store: PartStore, part: int, settings: ScoreFileSettings, outcome: Outcome
) -> int:
    """Counts a finished part's rows; `ConfigError` names the first that the file no longer has like this."""
    table = store.finished_columns(part, ["row", "content_key", "status", "reason"])
    assert table is not None
    known = table.to_pylist()
    for row, before in zip(members, known, strict=False):
        if row.key != before["content_key"]:
            raise _changed(settings, row.index, "was changed since it was scored")
        outcome.add(row.index, before["status"], before["reason"])
    if len(members) != len(known):
        raise _changed(settings, members[-1].index, f"ends a part of {len(known)} rows that now has {len(members)}")
    outcome.num_known += len(known)
    return len(known)


def _changed(settings: ScoreFileSettings, index: int, what: str) -> ConfigError:
    return ConfigError(
        f"{settings.source}: row {index} {what}; give the same file again, or score everything anew with --overwrite"
    )


def _answers(rows: Iterable[InputRow], client: Submitter, max_in_flight: int) -> Iterator[OutputRow]:
    """Answers in order; a slot is freed when its row is handed on."""
    waiting: deque[tuple[InputRow, Future[ScoreReply] | None]] = deque()
    for row in rows:
        waiting.append((row, client.submit(row.request) if row.is_asked else None))
        if len(waiting) >= max_in_flight:
            yield _finish(*waiting.popleft())
    while waiting:
        yield _finish(*waiting.popleft())


def _finish(row: InputRow, future: "Future[ScoreReply] | None") -> OutputRow:
    """A row that the teacher refuses is written down as such; an error about the service ends the run."""
    if future is None:
        return OutputRow(row=row, status=row.status, reason=row.reason, scores=None)
    try:
        reply = future.result()
    except OpdError as error:
        if error.retryable:
            raise
        return OutputRow(row=row, status="failed", reason=error.message, scores=None)
    if reply.teacher_fingerprint != row.request.teacher_fingerprint:
        raise InternalError(f"row {row.index}: was scored by teacher {reply.teacher_fingerprint}; run it again")
    return OutputRow(row=row, status=row.status, reason=row.reason, scores=reply.scores)
