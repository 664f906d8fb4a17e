"""The gradient probe: the same few rollouts throughout a run, whose gradients are compared every so many steps (6.2).

The probe is taken from the first step that is measured and kept in the run folder, so that a resumed run goes on with
the same one; its scores are the teacher's of then, the weights those after the step. A step with fewer rollouts than
`MIN_ROLLOUTS` makes no probe, and the metric is absent; so it is once the device had no memory for it, since no
diagnosis is worth a run.
"""

import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.errors import CheckpointError
from services.trainer.batch import ScoredRollout
from services.trainer.diagnostics.coherence import gradient_coherence
from services.trainer.loop import StepRecord

_log = logging.getLogger(__name__)
PROBE_FILE = "probe.npz"
MIN_ROLLOUTS = 8
RecordT = TypeVar("RecordT")


class GradientProbe:
    """Measures `distill/gradient_coherence`. `loss` is the objective's sum over rollouts, as it enters the step."""

    def __init__(
        self,
        loss: Callable[[Sequence[ScoredRollout]], Tensor],
        parameters: Iterable[Tensor],
        *,
        every_steps: int,
        num_rollouts: int,
        path: Path,
    ) -> None:
        self._loss = loss
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._every_steps = every_steps
        self._num_rollouts = num_rollouts
        self._path = path
        self._probe: list[ScoredRollout] | None = None

    def measure(self, record: StepRecord) -> dict[str, float]:
        """The metric where it is due; empty otherwise. `CheckpointError` when the probe's file cannot be used."""
        if not self._every_steps:
            return {}
        is_first = self._probe is None and not self._path.is_file()
        if not is_first and record.step % self._every_steps:
            return {}
        probe = self._rollouts(record)
        if len(probe) < MIN_ROLLOUTS:
            return {}
        try:
            losses = (lambda item=item: self._loss([item]) for item in probe)
            coherence = gradient_coherence(losses, self._parameters)
        except torch.OutOfMemoryError:
            _log.warning(
                "no memory for two more copies of the gradient: distill/gradient_coherence is not measured from here "
                "on; metrics.coherence_every_steps=0 does not try"
            )
            self._every_steps = 0
            return {}
        return {} if coherence is None else {"distill/gradient_coherence": coherence}

    def _rollouts(self, record: StepRecord) -> list[ScoredRollout]:
        if self._probe is None and self._path.is_file():
            self._probe = read_probe(self._path)
        if self._probe is None:
            chosen = spread(record.scored)[: self._num_rollouts]
            if len(chosen) < MIN_ROLLOUTS:
                return chosen
            write_probe(self._path, chosen)
            self._probe = chosen
        return self._probe


def spread(scored: Sequence[ScoredRollout]) -> list[ScoredRollout]:
    """One rollout of each prompt before a second of any: siblings would agree more than rollouts at large."""
    seen: Counter[int] = Counter()
    turns = []
    for item in scored:
        turns.append((seen[item.rollout.group], item.rollout.group))
        seen[item.rollout.group] += 1
    order = sorted(range(len(scored)), key=lambda index: turns[index])
    return [scored[index] for index in order]


def write_probe(path: Path, probe: Sequence[ScoredRollout]) -> None:
    """One NumPy archive without any pickle, whole or not there."""
    arrays = {f"{index}.{name}": value for index, item in enumerate(probe) for name, value in _flattened(item)}
    buffer = io.BytesIO()
    # Names have a dot, so none is an option of the function's own.
    np.savez(buffer, **cast(Any, arrays))
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(buffer.getvalue())
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); free space there") from error


def read_probe(path: Path) -> list[ScoredRollout]:
    """The way back of `write_probe`."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            values = dict(archive)
        count = len({name.partition(".")[0] for name in values})
        return [_rebuilt(ScoredRollout, f"{index}.", values) for index in range(count)]
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise CheckpointError(
            f"{path}: is no probe of this version ({error}); remove it, and the series begins anew"
        ) from error


def _flattened(record: Any, prefix: str = "") -> Iterator[tuple[str, NDArray[np.generic]]]:
    """Every field that is not None as an array, nested records by dotted names."""
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value):
            yield from _flattened(value, f"{prefix}{field.name}.")
        elif value is not None:
            yield f"{prefix}{field.name}", np.asarray(str(value) if isinstance(value, StrEnum) else value)


def _rebuilt(cls: type[RecordT], prefix: str, values: Mapping[str, NDArray[np.generic]]) -> RecordT:
    """A field that was not written takes its default."""
    hints = get_type_hints(cls)
    found: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        kind, name = hints[field.name], f"{prefix}{field.name}"
        if isinstance(kind, type) and is_dataclass(kind):
            found[field.name] = _rebuilt(kind, f"{name}.", values)
        elif name in values:
            value = values[name].item() if values[name].ndim == 0 else values[name]
            found[field.name] = kind(str(value)) if isinstance(kind, type) and issubclass(kind, StrEnum) else value
    return cls(**found)
