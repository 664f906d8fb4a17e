"""What `opd experiment run` does with the names it is given."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments.experiment import EVERYTHING, load, names
from experiments.plan import plan_table
from experiments.running import run_experiments
from experiments.store import Store


def run_command(chosen: Sequence[str], *, dry_run: bool, minutes: float | None, work_dir: Path) -> int:
    """Runs, or only shows, experiments by name; `ConfigError` for a name that is none."""
    experiments = [load(name) for name in (names() if EVERYTHING in chosen else dict.fromkeys(chosen))]
    if dry_run:
        Console().print(plan_table(experiments, Store(folder=work_dir.resolve())))
        return 0
    return run_experiments(experiments, work_dir=work_dir, minutes=minutes, console=Console(stderr=True))
