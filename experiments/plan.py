"""What is still to be run and about how long it takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from experiments.arms import Arm, Command, name_of
from experiments.availability import missing_needs
from experiments.experiment import Experiment
from experiments.keys import command_key, run_key
from experiments.store import Store

EVALUATION_MINUTES = 0.4
"""The share of a run's minutes that grading takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One thing to do: a training run, a command, or the grading of what an arm has trained."""

    maker: Arm | Command
    minutes: float
    seed: int | None = None
    """Of a training run; a piece of an arm without one is its grading."""

    @property
    def title(self) -> str:
        """For people: `training student-base after grpo, seed 0`."""
        if isinstance(self.maker, Command):
            return f"opd {self.maker.name}"
        if self.seed is None:
            return f"evaluating {name_of(self.maker)}"
        return f"training {name_of(self.maker)}, seed {self.seed}"


def pieces(makers: Sequence[Arm | Command], store: Store) -> list[Piece]:
    """What is missing of the makers, in the order it can be done; each once."""
    found: list[Piece] = []
    for maker in makers:
        found += [piece for piece in _pieces_of(maker, store) if piece not in found]
    return found


def _pieces_of(maker: Arm | Command, store: Store) -> list[Piece]:
    if store.is_finished(maker):
        return []
    if isinstance(maker, Command):
        return [Piece(maker=maker, minutes=maker.minutes)]
    training = max(maker.minutes - EVALUATION_MINUTES, 0.0)
    runs = [
        Piece(maker=maker, minutes=training, seed=seed) for seed in maker.seeds if not store.is_trained(maker, seed)
    ]
    return [*runs, Piece(maker=maker, minutes=EVALUATION_MINUTES * len(maker.seeds))]


def minutes_of(maker: Arm | Command) -> float:
    """All seeds of an arm, or a command, on two cores that have nothing else to do."""
    return maker.minutes if isinstance(maker, Command) else maker.minutes * len(maker.seeds)


def estimated_minutes(experiments: Sequence[Experiment], store: Store) -> float:
    """Of everything that is missing; what several experiments name is counted once."""
    makers = [maker for experiment in experiments for maker in experiment.makers()]
    return sum(piece.minutes for piece in pieces(makers, store))


def plan_table(experiments: Sequence[Experiment], store: Store) -> Table:
    """One line per arm and command; what an earlier line has already is said to be shared."""
    ready = [experiment for experiment in experiments if not missing_needs(experiment.needs())]
    now, all_of_it = estimated_minutes(ready, store), estimated_minutes(experiments, store)
    later = f", {all_of_it:.0f} with what is still needed" if len(ready) < len(experiments) else ""
    table = Table(title="Experiments", caption=f"about {now:.0f} minutes to run{later}")
    for column in ("experiment", "arm", "key", "seeds", "minutes", "state"):
        table.add_column(column, justify="right" if column in ("seeds", "minutes") else "left")
    seen: list[Arm | Command] = []
    for experiment in experiments:
        labels = {id(model): label for label, model in (*experiment.arms.items(), *experiment.reports.items())}
        missing = missing_needs(experiment.needs())
        for maker in experiment.makers():
            state = _state(maker, store, is_shared=maker in seen, missing=missing)
            label = next((text for key, text in labels.items() if key == id(maker)), name_of(maker))
            key = command_key(maker) if isinstance(maker, Command) else run_key(maker, maker.seeds[0])
            seeds = "1" if isinstance(maker, Command) else str(len(maker.seeds))
            table.add_row(experiment.name, label, key[:8], seeds, f"{minutes_of(maker):.1f}", state)
            seen.append(maker)
    return table


def _state(maker: Arm | Command, store: Store, *, is_shared: bool, missing: Sequence[str]) -> str:
    if missing:
        return f"needs {', '.join(missing)}"
    if store.is_finished(maker):
        return "done"
    return "shared" if is_shared else "to run"


def overview_table(experiments: Sequence[Experiment], store: Store) -> Table:
    """One line per experiment."""
    table = Table(title="Experiments")
    for column in ("name", "of the paper", "shows", "minutes left"):
        table.add_column(column, justify="right" if column == "minutes left" else "left", no_wrap=column == "name")
    for experiment in experiments:
        missing = missing_needs(experiment.needs())
        left = f"needs {', '.join(missing)}" if missing else f"{estimated_minutes([experiment], store):.0f}"
        table.add_row(experiment.name, experiment.figures, experiment.title, left)
    return table
