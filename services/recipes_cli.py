"""`opd data` and `opd cold-start`: what is done before a distillation run."""

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides.", show_default=False)]


def data(overrides: Overrides = None, config: ConfigOption = None) -> None:
    """Makes a prompt set: templates, de-duplication, length filter, mixing; with a card that accounts for every row.

    For example: opd data sources.dapo.files='["dapo.parquet"]' template=boxed output=prompts.parquet
    """
    from opd.settings import load_settings
    from services.trainer.recipes.data.config import DataRecipeSettings

    settings = load_settings(DataRecipeSettings, config, overrides or [])
    from rich.console import Console

    from services.trainer.recipes.data.command import run_data_recipe

    run_data_recipe(settings, Console(stderr=True))


def cold_start(
    overrides: Overrides = None,
    config: ConfigOption = None,
    until: Annotated[str, typer.Option(help="Last stage to run: rollouts, filter or sft.")] = "sft",
    then_train: Annotated[
        Path | None, typer.Option(help="Configuration of the distillation run that follows, on the other prompts.")
    ] = None,
) -> None:
    """Fine-tunes a student on a teacher's filtered responses before distillation; the same command again goes on.

    For example: opd cold-start student.model=S teacher.model=T data.files='["prompts.parquet"]'
    """
    from opd.errors import ConfigError
    from opd.logs import configure_logging
    from opd.settings import load_settings
    from services.trainer.recipes.cold_start.config import ColdStartSettings

    settings = load_settings(ColdStartSettings, config, overrides or [])
    configure_logging(settings.log.level, as_json=settings.log.as_json)
    from rich.console import Console

    from services.trainer.recipes.cold_start.command import run_cold_start
    from services.trainer.recipes.cold_start.stages import Stage

    if until not in list(Stage):
        raise ConfigError(f"until={until}: is no stage; choose one of {', '.join(Stage)}")
    console = Console(stderr=True)
    raise typer.Exit(run_cold_start(settings, console, until=Stage(until), then_train=then_train))
