"""Weights & Biases. The run's id is kept in the run folder, so that a resumed run goes on with the same one."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, first_line
from services.trainer.diagnostics import StepSummary
from services.trainer.loggers.config import WandbMode, WandbSettings
from services.trainer.loggers.contract import flat

ID_FILE = "wandb_id"
STEP = "step"


class WandbLogger:
    """One run there. `ConfigError` when it cannot be begun, for want of a key or a network for instance."""

    name = "wandb"

    def __init__(self, settings: WandbSettings, run_dir: Path, *, config: Mapping[str, Any]) -> None:
        # Its console would write over ours, and it is no place of a training run to offer an account.
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or run_dir.resolve().name,
                id=_run_id(run_dir),
                dir=str(run_dir),
                mode="offline" if settings.mode is WandbMode.OFFLINE else "online",
                resume="allow",
                config=dict(config),
                settings=wandb.Settings(console="off", disable_git=True),
            )
        except (wandb.errors.Error, OSError) as error:
            way_out = "" if settings.mode is WandbMode.OFFLINE else "; run `wandb login`, or set mode=offline"
            raise ConfigError(f"loggers.wandb.mode={settings.mode}: {first_line(error)}{way_out}") from error
        # Steps are told as a metric of their own: wandb's counter only rises, a resumed run's steps may go back.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def log_step(self, step: int, summary: StepSummary) -> None:
        self.log_values(step, flat(summary))

    def log_values(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({STEP: step, **values})

    def log_text(self, step: int, tag: str, text: str) -> None:
        self._run.alert(title=tag, text=text)

    def close(self) -> None:
        self._run.finish()


def _run_id(run_dir: Path) -> str:
    path = run_dir / ID_FILE
    if not path.is_file():
        path.write_text(secrets.token_hex(8), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
