"""Runs experiments: what is missing of each, in order, within a budget, and its results when nothing is missing.

An arm that fails ends its experiment and the others go on. Results are written per experiment, so that a session that
is stopped leaves whole experiments behind.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.arms import Command
from experiments.availability import missing_needs
from experiments.bench import Bench, Tell, open_bench
from experiments.claims import Claim
from experiments.experiment import Experiment
from experiments.plan import Piece, estimated_minutes, pieces
from experiments.results import RESULTS, write_results
from experiments.store import Store, evaluations_of
from opd.errors import OpdError
from testbed.processes import Terminated, terminable

FAILED = 1
_INTERRUPTED = 130
_SECONDS_A_MINUTE = 60


class OutOfTime(Exception):
    """The budget is spent; what was under way is finished."""


@dataclass(kw_only=True, slots=True)
class Session:
    """One call of `opd experiment run`."""

    bench: Bench
    progress: Progress
    console: Console
    deadline: float
    """On the monotonic clock."""
    results: Path

    def run(self, experiment: Experiment) -> None:
        """Makes what is missing of an experiment, then its results; raises `OutOfTime` in between."""
        todo = pieces(experiment.makers(), self.bench.store)
        task = self.progress.add_task(experiment.name, total=sum(piece.minutes for piece in todo), doing="")
        done = 0.0
        for piece in todo:
            if time.monotonic() > self.deadline:
                raise OutOfTime
            if not self.console.is_terminal:
                # Where no bar can be drawn, a line for each piece says where the hours go.
                self.console.print(f"{experiment.name}: {piece.title}, about {piece.minutes:.1f} min", soft_wrap=True)
            self._do(piece, partial(self._tell, task, done, piece.minutes))
            done += piece.minutes
        self.progress.update(task, completed=done, doing="done")
        claims = write_results(experiment, self.bench.store, self.results)
        self.console.print(verdicts_table(experiment, claims))

    def _do(self, piece: Piece, tell: Tell) -> None:
        if isinstance(piece.maker, Command):
            self.bench.make(piece.maker, tell)
        elif piece.seed is None:
            self.bench.evaluate(evaluations_of(piece.maker), tell)
        else:
            self.bench.train(piece.maker, piece.seed, tell)

    def _tell(self, task: TaskID, done: float, minutes: float, doing: str, share: float) -> None:
        self.progress.update(task, completed=done + minutes * share, doing=doing)


def run_experiments(
    experiments: Sequence[Experiment],
    *,
    work_dir: Path,
    minutes: float | None,
    console: Console,
    results: Path = RESULTS,
) -> int:
    """Runs every experiment whose needs are met; returns the exit code."""
    ready = [experiment for experiment in experiments if not _say_missing(experiment, console)]
    left = estimated_minutes(ready, Store(folder=work_dir.resolve()))
    console.print(f"about {left:.0f} minutes to run on two cores that have nothing else to do")
    deadline = time.monotonic() + (minutes * _SECONDS_A_MINUTE if minutes is not None else float("inf"))
    try:
        with terminable(), open_bench(work_dir) as bench, _progress(console) as progress:
            session = Session(bench=bench, progress=progress, console=console, deadline=deadline, results=results)
            failed = _run_each(session, ready)
    except OutOfTime:
        left = estimated_minutes(ready, Store(folder=work_dir.resolve()))
        console.print(f"stopped after {minutes:g} minutes; about {left:.0f} are left, run it again to go on")
        return 0
    except (KeyboardInterrupt, Terminated):
        console.print("stopped; run it again to go on")
        return _INTERRUPTED
    for name, reason in failed.items():
        console.print(f"{name} failed: {reason}", style="red", soft_wrap=True)
    return FAILED if failed else 0


def _run_each(session: Session, experiments: Sequence[Experiment]) -> dict[str, str]:
    failed = {}
    for experiment in experiments:
        try:
            session.run(experiment)
        except OpdError as error:
            failed[experiment.name] = error.message
    return failed


def _say_missing(experiment: Experiment, console: Console) -> bool:
    missing = missing_needs(experiment.needs())
    if missing:
        console.print(f"{experiment.name} is left out: it needs {', '.join(missing)}")
    return bool(missing)


def verdicts_table(experiment: Experiment, claims: Sequence[Claim]) -> Table:
    """What came of each claim, one line each."""
    table = Table(title=f"{experiment.figures}: {experiment.title}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("claim")
    table.add_column("verdict", no_wrap=True)
    for claim in claims:
        table.add_row(claim.statement, str(claim.verdict()).removesuffix(" at this scale"))
    return table


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(), TextColumn("{task.fields[doing]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield progress
