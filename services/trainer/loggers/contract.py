"""What a logger is to the run, and how several of them are one."""

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from services.trainer.diagnostics import StepSummary

_log = logging.getLogger(__name__)


class MetricsLogger(Protocol):
    """Takes a run's numbers as they come, keys `area/name`."""

    name: str

    def log_step(self, step: int, summary: StepSummary) -> None:
        """A completed step, counted from 1."""
        ...

    def log_values(self, step: int, values: Mapping[str, float]) -> None:
        """What belongs to a step besides, such as an evaluation after it."""
        ...

    def log_text(self, step: int, tag: str, text: str) -> None:
        """A line for people, such as an alarm."""
        ...

    def close(self) -> None:
        """Writes out whatever is still held back."""
        ...


class Loggers:
    """All loggers of a run. One that fails is told about once and left out: the run's own files have everything."""

    def __init__(self, loggers: Sequence[MetricsLogger] = ()) -> None:
        self._loggers = list(loggers)

    def log_step(self, step: int, summary: StepSummary) -> None:
        self._each("log_step", step, summary)

    def log_values(self, step: int, values: Mapping[str, float]) -> None:
        self._each("log_values", step, values)

    def log_text(self, step: int, tag: str, text: str) -> None:
        self._each("log_text", step, tag, text)

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *arguments: object) -> None:
        for logger in list(self._loggers):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:
                # Whatever a library for pictures of a run raises, hours of training are worth more.
                _log.warning("logger %s is left out from here on: %s", logger.name, error)
                self._loggers.remove(logger)


def flat(summary: StepSummary) -> dict[str, float]:
    """Every number of a step; a bucket that anything fell into as `<key>/by_position/<start>`."""
    buckets = {
        f"{name}/by_position/{edge:05d}": mean.value
        for name, found in summary.by_position.items()
        for edge, mean in zip(found.edges, found.means, strict=True)
        if mean.count
    }
    return summary.values | buckets
