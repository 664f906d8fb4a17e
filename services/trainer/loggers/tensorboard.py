"""TensorBoard event files, by tensorboardX: the writer alone, without TensorBoard's own server and its dependencies."""

from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

from services.trainer.diagnostics import StepSummary
from services.trainer.loggers.contract import flat

FOLDER = "tensorboard"


class TensorBoardLogger:
    """Writes to `tensorboard/` of the run folder; steps that a resumed run takes again replace the earlier ones."""

    name = "tensorboard"

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        """`first_step` is the number of completed steps."""
        self._writer = SummaryWriter(logdir=str(run_dir / FOLDER), flush_secs=10, purge_step=first_step + 1)

    def log_step(self, step: int, summary: StepSummary) -> None:
        self.log_values(step, flat(summary))

    def log_values(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_text(self, step: int, tag: str, text: str) -> None:
        self._writer.add_text(tag, text, step)

    def close(self) -> None:
        self._writer.close()
