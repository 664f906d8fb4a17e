"""What rank 0 alone does of a run, and what the others do in its place: nothing that anybody sees.

All ranks go through the same steps, metrics and decisions; a file, a line, a server and an evaluation are rank 0's.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from services.trainer.console import RunConsole
from services.trainer.distributed.ranks import Ranks, together
from services.trainer.distributed.sharding import gathered
from services.trainer.run_log import RunLog

Evaluate = Callable[[int], dict[str, float]]


class SilentRunLog(RunLog):
    """Reads what rank 0 writes, and writes nothing."""

    def create(self, config: Mapping[str, Any]) -> None:
        """Rank 0 has done it."""

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        """Rank 0 does it."""

    def _write_atomically(self, name: str, text: str) -> None:
        """Rank 0 does it."""

    def write_evaluation(self, name: str, result: Mapping[str, Any]) -> None:
        """Rank 0 does it."""


def run_log(ranks: Ranks, run_dir: Path) -> RunLog:
    return RunLog(run_dir) if ranks.rank == 0 else SilentRunLog(run_dir)


def run_console(ranks: Ranks) -> RunConsole:
    return RunConsole(Console(stderr=True, quiet=ranks.rank > 0))


def evaluated_once(
    ranks: Ranks, model: nn.Module, evaluate: Evaluate | None, interruptible: Callable[[], AbstractContextManager[None]]
) -> Evaluate | None:
    """Evaluates on rank 0, from a whole copy of the weights, while the others wait; all get the results.

    A signal ends it at once, for all ranks alike; see `StopSignal.interruptible`.
    """
    if evaluate is None:
        return None

    def evaluate_together(step: int) -> dict[str, float]:
        results: dict[str, float] = {}
        with gathered(model, ranks), together(ranks), interruptible():
            if ranks.rank == 0:
                results = evaluate(step)
        first: dict[str, float] = ranks.gather(results)[0]
        return first

    return evaluate_together
