"""`opd experiment ...`: the paper's figures at testbed scale. Loads nothing heavy before a command runs."""

from pathlib import Path
from typing import Annotated

import typer

experiment_app = typer.Typer(help="The paper's figures at testbed scale.", no_args_is_help=True)

WorkDirOption = Annotated[Path, typer.Option(help="Runs, evaluations and models, kept by what they are made of.")]
_WORK_DIR = Path("runs/experiments")


@experiment_app.command("list")
def list_experiments(work_dir: WorkDirOption = _WORK_DIR) -> None:
    """Names every experiment, what it shows, and how many minutes are left to run."""
    from rich.console import Console

    from experiments.experiment import load, names
    from experiments.plan import overview_table
    from experiments.store import Store

    Console().print(overview_table([load(name) for name in names()], Store(folder=work_dir.resolve())))


@experiment_app.command("run")
def run_experiment(
    names: Annotated[list[str], typer.Argument(help="Of experiments, or all.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the arms and how long they take.")] = False,
    minutes: Annotated[float | None, typer.Option(min=0, help="Start no arm after so many minutes.")] = None,
    work_dir: WorkDirOption = _WORK_DIR,
) -> None:
    """Runs what is missing of experiments, then judges and draws them; a stopped run goes on where it was."""
    from experiments.command import run_command

    raise typer.Exit(run_command(names, dry_run=dry_run, minutes=minutes, work_dir=work_dir))


@experiment_app.command("report")
def report_experiments(
    output: Annotated[Path | None, typer.Option(help="Markdown file; default: docs/experiments.md.")] = None,
) -> None:
    """Writes the page of all claims and figures from what has been run."""
    from experiments.report import write_report

    typer.echo(f"wrote {write_report(output)}")
