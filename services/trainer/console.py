"""What a person at the terminal sees of a run: one line a step, and a bar where there is a terminal to draw it on."""

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from opd.logs import is_json

_log = logging.getLogger(__name__)

_COLUMNS = (
    ("loss/reverse_kl", "reverse_kl", "{:.4f}"),
    ("distill/overlap_ratio", "overlap", "{:.1%}"),
    ("outcome/accuracy", "accuracy", "{:.1%}"),
    ("rollout/response_length", "length", "{:.0f}"),
    ("timing/tokens_per_second", "tokens/s", "{:.0f}"),
    ("timing/step", "step_s", "{:.2f}"),
)


def step_line(step: int, num_steps: int, metrics: Mapping[str, float]) -> str:
    """One dense line; a metric that was not measured is left out."""
    width = len(str(num_steps))
    parts = [f"{label} {text.format(metrics[name])}" for name, label, text in _COLUMNS if name in metrics]
    return f"step {step:>{width}}/{num_steps}  " + "  ".join(parts)


class RunConsole:
    """Writes to standard error; entered while steps are taken."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not is_json():
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def begin(self, step: int, num_steps: int) -> None:
        if self._progress is not None:
            self._task = self._progress.add_task("training", total=num_steps, completed=step)

    def finish_step(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        self.say(step_line(step, num_steps, metrics))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)

    def say(self, line: str) -> None:
        """One line as it is: nothing in it is markup, and a narrow terminal does not break it."""
        if is_json():
            _log.info("%s", line)
            return
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
