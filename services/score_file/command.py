"""`opd score FILE --out ...`: puts the parts together, shows progress and says what came of it."""

import logging
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from opd.client import SyncScoreClient
from opd.credentials import Credentials
from opd.errors import UnsupportedError
from opd.types import Capability, TeacherInfo
from opd.vocabulary import check_same_vocabulary, describe_vocabulary
from services.score_command import load_tokenizer
from services.score_file.parts import PartStore
from services.score_file.rows import RowReader, count_rows
from services.score_file.scoring import Outcome, score_rows
from services.score_file.settings import ScoreFileSettings

_log = logging.getLogger(__name__)
_INTERRUPTED = 130


def score_file(settings: ScoreFileSettings, url: str, credentials: Credentials | None = None) -> int:
    """Scores every row; the exit code is 0, or 130 after Ctrl-C, which keeps what is finished."""
    console = Console(stderr=True)
    num_rows = count_rows(settings.source)
    tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    try:
        outcome = _run(settings, _connect(settings, url, credentials), tokenizer, num_rows, console)
    except KeyboardInterrupt:
        console.print("stopped; finished parts are kept, the same command goes on from there", highlight=False)
        return _INTERRUPTED
    _report(outcome, settings, console)
    return 0


def _connect(settings: ScoreFileSettings, url: str, credentials: Credentials | None) -> SyncScoreClient:
    return SyncScoreClient.connect(url, teacher=settings.teacher, tenant=settings.tenant, credentials=credentials)


def _run(
    settings: ScoreFileSettings, connected: SyncScoreClient, tokenizer: Any, num_rows: int, console: Console
) -> Outcome:
    with connected as client:
        info = client.info()
        _check(settings, tokenizer, info)
        store = PartStore(settings)
        store.open(settings.manifest(info.fingerprint))
        rows = RowReader(settings, tokenizer, info).read()
        with _progress(console) as progress:
            task = progress.add_task(f"{info.model} ({info.fingerprint[:12]})", total=num_rows)
            return score_rows(rows, client, store, settings, lambda count: progress.advance(task, count))


def _check(settings: ScoreFileSettings, tokenizer: Any, info: TeacherInfo) -> None:
    """Refuses at once what every row would be refused for."""
    if tokenizer is not None:
        for warning in check_same_vocabulary(describe_vocabulary(tokenizer), str(settings.tokenizer), info):
            _log.warning("%s", warning)
    needed = {Capability.SAMPLED_LOGPROBS}
    needed |= {Capability.TEACHER_TOP_K} if settings.score_top_k else set()
    needed |= {Capability.ENTROPY} if settings.wants_entropy else set()
    needed |= {Capability.CANDIDATE_LOGPROBS} if settings.candidates_column else set()
    needed |= {Capability.BATCH_INVARIANT} if settings.batch_invariant else set()
    missing = sorted(needed - info.capabilities)
    if missing:
        raise UnsupportedError(f"teacher {info.teacher} ({info.engine}): cannot supply {', '.join(missing)}")
    if info.max_score_top_k and settings.score_top_k > info.max_score_top_k:
        raise UnsupportedError(
            f"--top-k {settings.score_top_k}: teacher {info.teacher} takes at most {info.max_score_top_k}; lower it"
        )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console,
    )  # fmt: skip


def _report(outcome: Outcome, settings: ScoreFileSettings, console: Console) -> None:
    counts = ", ".join(f"{count:,} {status}" for status, count in sorted(outcome.counts.items()))
    known = f" ({outcome.num_known:,} of them by an earlier run)" if outcome.num_known else ""
    if outcome.listed:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        for column in ("row", "status", "reason"):
            table.add_column(column)
        for row, status, reason in outcome.listed:
            table.add_row(str(row), status, Text(reason))
        console.print(table)
        rest = outcome.counts.total() - outcome.counts["scored"] - len(outcome.listed)
        if rest:
            console.print(f"... and {rest:,} more; see the columns status and reason", highlight=False)
    console.print(f"{settings.target}: {counts}{known}", highlight=False, soft_wrap=True)
