"""Opens the loggers that the settings name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.trainer.loggers.config import LoggerSettings, WandbMode, require_packages
from services.trainer.loggers.contract import Loggers, MetricsLogger


def open_loggers(settings: LoggerSettings, run_dir: Path, *, config: Mapping[str, Any], first_step: int) -> Loggers:
    """`config` goes where there is a place for it; `first_step` counts completed steps. The caller closes them."""
    require_packages(settings)
    found: list[MetricsLogger] = []
    if settings.tensorboard:
        from services.trainer.loggers.tensorboard import TensorBoardLogger

        found.append(TensorBoardLogger(run_dir, first_step=first_step))
    if settings.wandb.mode is not WandbMode.OFF:
        from services.trainer.loggers.wandb import WandbLogger

        found.append(WandbLogger(settings.wandb, run_dir, config=config))
    return Loggers(found)
