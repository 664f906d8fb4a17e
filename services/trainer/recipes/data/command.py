"""What `opd data` does: the pipeline, its output, the card and the list of what was dropped."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from opd.errors import ConfigError
from services.trainer.recipes.data.card import as_markdown, build_card, drop_record
from services.trainer.recipes.data.config import DataRecipeSettings
from services.trainer.recipes.data.pipeline import run_pipeline
from services.trainer.recipes.data.writing import write_rows, write_text


def run_data_recipe(settings: DataRecipeSettings, console: Console) -> dict[str, Any]:
    """Writes the output and, beside it, `.card.json`, `.card.md` and `.dropped.jsonl`; returns the card.

    Raises `ConfigError`, before anything is read where it can.
    """
    if settings.output.exists():
        raise ConfigError(f"output={settings.output}: exists; remove it or give another name")

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)

    recipe = run_pipeline(settings, progress)
    write_rows(beside(settings.output, ".dropped.jsonl"), [drop_record(drop) for drop in recipe.drops])
    write_rows(settings.output, [candidate.rendered() for candidate in recipe.kept])
    card = build_card(settings, recipe)
    write_text(beside(settings.output, ".card.json"), json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    write_text(beside(settings.output, ".card.md"), as_markdown(card))
    _print(card, settings.output, console)
    return card


def beside(output: Path, suffix: str) -> Path:
    """`x.parquet` -> `x.card.md`"""
    return output.with_name(output.stem + suffix)


def _print(card: dict[str, Any], output: Path, console: Console) -> None:
    table = Table("stage", "in", "out", "dropped")
    for stage in card["stages"]:
        dropped = ", ".join(f"{reason} {count}" for reason, count in stage["dropped"].items()) or "-"
        table.add_row(stage["stage"], str(stage["in"]), str(stage["out"]), dropped)
    console.print(table)
    console.print(f"wrote {output} and {beside(output, '.card.md')}", markup=False, soft_wrap=True)
