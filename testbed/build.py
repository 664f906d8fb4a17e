"""Command line of the testbed's build: ``python -m testbed.build``.

Trains the whole family from scratch, or goes on where an earlier run stopped. Heavy modules are imported after the
options are parsed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

HERE = Path(__file__).parent


def build(
    only: Annotated[str | None, typer.Option(help="Build this model alone.")] = None,
    models_dir: Annotated[Path, typer.Option(help="Where finished models go.")] = HERE / "models",
    data_dir: Annotated[Path, typer.Option(help="Where problem files go.")] = HERE / "data",
    work_dir: Annotated[Path, typer.Option(help="Where checkpoints are kept.")] = Path("runs/testbed"),
    seed: Annotated[int, typer.Option(help="Seed of everything drawn at random.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of the tensor library; 0 leaves its default.")] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="A tiny number of updates, to test the build itself.")] = False,
) -> None:
    """Train the testbed's models, measure them and write their cards."""
    import torch

    from testbed.datasets import write_files
    from testbed.family import FAST, FULL
    from testbed.stages import Build, run_stages

    if threads:
        torch.set_num_threads(threads)
    write_files(data_dir, seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, update: int, updates: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=updates)
            progress.update(tasks[stage], completed=update, description=f"{stage}, loss {loss:.3f}")

        scale = FAST if fast else FULL
        run_stages(Build(work=work_dir, models=models_dir, seed=seed, scale=scale, report=report), only)


if __name__ == "__main__":
    typer.run(build)
