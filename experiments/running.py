"""Runs experiments: what is missing of each, in order, within a budget, and its results when nothing is missing.

An arm that fails ends its experiment and the others go on. Results are written per experiment, so that a session that
is stopped leaves whole experiments behind.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.arms import Command
from experiments.availability import missing_needs
from experiments.bench import Bench, open_bench
from experiments.experiment import Experiment
from experiments.plan import estimated_minutes, unfinished
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
    failures: dict[str, str] = field(default_factory=dict)
    """By what failed, why."""

    def run(self, experiment: Experiment) -> None:
        """Makes what is missing of an experiment, then its results; raises `OutOfTime` in between."""
        task = self.progress.add_task(experiment.name, total=1.0, doing="")
        pieces = list(self._pieces(experiment))
        for number, (minutes, piece) in enumerate(pieces):
            if time.monotonic() > self.deadline:
                raise OutOfTime
            done, total = sum(m for m, _ in pieces[:number]), sum(m for m, _ in pieces)

            def tell(
                doing: str, share: float, done: float = done, minutes: float = minutes, total: float = total
            ) -> None:
                self.progress.update(task, completed=(done + minutes * share) / total, doing=doing)

            piece(tell)
        self.progress.update(task, completed=1.0, doing="done")
        write_results(experiment, self.bench.store, self.results)

    def _pieces(self, experiment: Experiment) -> Iterator[tuple[float, Callable[[Callable[[str, float], None]], None]]]:
        """Minutes and what to call, for every piece of work that is missing."""
        for maker in unfinished(experiment, self.bench.store):
            if isinstance(maker, Command):
                yield maker.minutes, partial(self.bench.make, maker)
                continue
            for seed in maker.seeds:
                if not self.bench.store.is_trained(maker, seed):
                    yield maker.minutes, partial(self.bench.train, maker, seed)
            yield 0.0, partial(self.bench.evaluate, evaluations_of(maker))


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


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(), TextColumn("{task.fields[doing]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield progress
