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
    gates: Annotated[bool, typer.Option(help="End with the distillations that judge the family.")] = True,
) -> None:
    """Train the testbed's models, measure them, write their cards and judge the family by its gates."""
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
    # The gates distil the bundled models, so they say nothing of a family that was built elsewhere or in part.
    if gates and only is None and not fast and models_dir == HERE / "models":
        from testbed.gates import main as run_gates

        run_gates()


if __name__ == "__main__":
    typer.run(build)
