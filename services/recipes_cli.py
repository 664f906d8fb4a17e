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
