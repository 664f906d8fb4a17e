"""What `opd cold-start` does: its stages, its card, and the way on to distillation."""

import json
import logging
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from opd.settings import load_settings
from services.trainer.config import TrainSettings
from services.trainer.recipes.cold_start.card import as_markdown, build_card
from services.trainer.recipes.cold_start.config import ColdStartSettings
from services.trainer.recipes.cold_start.stages import MODEL_FOLDER, REMAINING_FILE, Stage, run_stages
from services.trainer.recipes.data.writing import write_text
from services.trainer.run import run_training
from services.trainer.run_log import METRICS_FILE
from services.trainer.stop import StopRequested, StopSignal

_log = logging.getLogger(__name__)


def run_cold_start(settings: ColdStartSettings, console: Console, *, until: Stage, then_train: Path | None) -> int:
    """Returns the exit code. The training configuration is checked before anything is sampled."""
    overrides = train_overrides(settings)
    if then_train is not None:
        load_settings(TrainSettings, then_train, overrides)
    transformers_logging.disable_progress_bar()
    with StopSignal() as stop:
        try:
            with stop.interruptible():
                _prepare(settings, console, until)
        except StopRequested as request:
            _log.info("stopped by %s; the same command goes on from here", request.signal_name)
            return request.exit_code
    if until is not Stage.SFT:
        return 0
    if then_train is None:
        command = " ".join(shlex.quote(word) for word in ("opd", "train", "-c", "CONFIG.toml", *overrides))
        _say(console, f"next: {command}")
        return 0
    train_dir = load_settings(TrainSettings, then_train, overrides).run_dir
    return run_training(then_train, overrides, resume=(train_dir / METRICS_FILE).is_file())


def train_overrides(settings: ColdStartSettings) -> list[str]:
    """What makes a training configuration the second half of this recipe."""
    model = json.dumps(str(settings.run_dir / MODEL_FOLDER))
    files = json.dumps([str(settings.run_dir / REMAINING_FILE)])
    return [f"student.model={model}", f"data.files={files}"]


def _prepare(settings: ColdStartSettings, console: Console, until: Stage) -> None:
    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)

    result = run_stages(settings, progress, lambda line: _say(console, line), until=until)
    card = build_card(settings, result)
    write_text(settings.run_dir / "card.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    write_text(settings.run_dir / "card.md", as_markdown(card))
    _say(console, as_markdown(card))


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
