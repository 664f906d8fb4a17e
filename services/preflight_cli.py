"""`opd preflight`: whether a teacher will help this student, before anything is trained."""

from pathlib import Path
from typing import Annotated

import typer


def preflight(
    student: Annotated[str | None, typer.Option(help="Folder or hub name.", show_default=False)] = None,
    teachers: Annotated[
        list[str] | None,
        typer.Option("--teachers", help="Folders, hub names, URL#POOL or pool names.", show_default=False),
    ] = None,
    more_teachers: Annotated[
        list[str] | None, typer.Argument(metavar="[T2 ...]", help="Further teachers.", show_default=False)
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompts", help="Problem file or data set; may be repeated.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="How many of them; default 200.")] = None,
    pilot_steps: Annotated[
        int | None, typer.Option(help="Train so many steps with each teacher: only this tells of new knowledge.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the report; default runs/preflight.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Of prompts, samples and intervals.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, e.g. objective.score_top_k=8.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file of settings.")] = None,
) -> None:
    """Judges teachers for a student before training: alignment, accuracy, gradients, templates, and ranks them.

    `opd preflight --student S --teachers T1 T2 T3 --prompts FILE`; the same command goes on where it was cut off.
    """
    import json

    from opd.settings import load_settings
    from services.trainer.recipes.preflight.settings import PreflightSettings

    named = [*(teachers or []), *(more_teachers or [])]
    given = {
        "student": student,
        "teachers": named or None,
        "prompts": prompts,
        "num_prompts": num_prompts,
        "pilot.steps": pilot_steps,
        "output_dir": None if output is None else str(output),
        "seed": seed,
    }
    overrides = [f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    settings = load_settings(PreflightSettings, config, [*overrides, *(set_ or [])])

    from rich.console import Console

    from services.trainer.recipes.preflight.command import preflight_command

    raise typer.Exit(preflight_command(settings, Console()))
