"""The gradient probe: the same few rollouts throughout a run, whose gradients are compared every so many steps (6.2).

The probe is taken from the first step that has enough for it and kept in the run folder, so that a resumed run goes on
with the same one, unless its objective is another; its scores are the teacher's of then, the weights those after the
step. What an attempt took beyond the checkpoint that a run goes on from is taken again with its step.
Where an advantage is the whole signal, rollouts without one have no gradient and are not taken. A step with fewer
rollouts than `MIN_ROLLOUTS` makes no probe, and the metric is absent; so it is once a measurement has failed, for want
of memory or whatever else, since no diagnosis is worth a run.
"""

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opd.errors import CheckpointError, OpdError
from opd.files import whole_file
from services.trainer.batch import ScoredRollout
from services.trainer.diagnostics.coherence import gradient_coherence
from services.trainer.loop import StepRecord
from services.trainer.memory import is_out_of_memory
from services.trainer.objectives.config import ObjectiveConfig

_log = logging.getLogger(__name__)
PROBE_FILE = "probe.npz"
MIN_ROLLOUTS = 8
_OBJECTIVE = "objective"
_STEP = "step"
RecordT = TypeVar("RecordT")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredProbe:
    """What lies in the run folder."""

    objective: str
    """Digest of what it was taken for."""
    step: int
    """At which it was taken, counted from 1."""
    rollouts: Sequence[ScoredRollout]


class GradientProbe:
    """Measures `distill/gradient_coherence`. `loss` is `objective`'s sum over rollouts, as it enters the step."""

    def __init__(
        self,
        loss: Callable[[Sequence[ScoredRollout]], Tensor],
        parameters: Iterable[Tensor],
        *,
        objective: ObjectiveConfig,
        every_steps: int,
        num_rollouts: int,
        path: Path,
    ) -> None:
        self._loss = loss
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._every_steps = every_steps
        self._num_rollouts = num_rollouts
        self._path = path
        self._only_outcomes = not objective.uses_teacher
        self._objective = _digest(objective)
        self._probe = stored_probe(path, self._objective) if every_steps else None

    def measure(self, record: StepRecord) -> dict[str, float]:
        """The metric where it is due; empty otherwise."""
        if not self._every_steps:
            return {}
        if self._probe is not None and record.step % self._every_steps:
            return {}
        try:
            return self._measure(self._rollouts(record))
        except OpdError as error:
            _log.warning("distill/gradient_coherence is not measured from here on: %s", error.message)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _log.warning(
                "no memory for two more copies of the gradient: distill/gradient_coherence is not measured from here "
                "on; metrics.coherence_every_steps=0 does not try"
            )
        self._every_steps = 0
        return {}

    def _measure(self, probe: Sequence[ScoredRollout]) -> dict[str, float]:
        if len(probe) < MIN_ROLLOUTS:
            return {}
        losses = (lambda item=item: self._loss([item]) for item in probe)
        coherence = gradient_coherence(losses, self._parameters)
        return {} if coherence is None else {"distill/gradient_coherence": coherence}

    def _rollouts(self, record: StepRecord) -> Sequence[ScoredRollout]:
        if self._probe is None:
            candidates = [item for item in record.scored if item.advantage or not self._only_outcomes]
            chosen = spread(candidates)[: self._num_rollouts]
            if len(chosen) < MIN_ROLLOUTS:
                return chosen
            write_probe(self._path, StoredProbe(objective=self._objective, step=record.step, rollouts=chosen))
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


def stored_probe(path: Path, objective: str) -> Sequence[ScoredRollout] | None:
    """The probe of an earlier part of the run; None, with a warning, for one that this objective cannot go on with."""
    if not path.is_file():
        return None
    try:
        probe = read_probe(path)
    except CheckpointError as error:
        _log.warning("%s", error.message)
        return None
    if probe.objective != objective:
        _log.warning("%s: was taken for another objective, so distill/gradient_coherence begins anew", path)
        return None
    return probe.rollouts


def remove_probe(path: Path, *, after: int | None = None) -> None:
    """Removes the probe, or one of a step beyond `after` alone; `CheckpointError` when the disk refuses."""
    if after is not None:
        try:
            if read_probe(path).step <= after:
                return
        except CheckpointError:
            # None there, or one that is told of where it would be used.
            return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be removed ({error.strerror}); remove it by hand") from error


def _digest(objective: ObjectiveConfig) -> str:
    return hashlib.sha256(objective.model_dump_json().encode()).hexdigest()


def write_probe(path: Path, probe: StoredProbe) -> None:
    """One NumPy archive without any pickle, whole or not there."""
    arrays = {f"{index}.{name}": value for index, item in enumerate(probe.rollouts) for name, value in _flattened(item)}
    arrays |= {_OBJECTIVE: np.asarray(probe.objective), _STEP: np.asarray(probe.step)}
    buffer = io.BytesIO()
    # Names have a dot or are no option of the function's own.
    np.savez(buffer, **cast(Any, arrays))
    try:
        with whole_file(path) as partial:
            partial.write_bytes(buffer.getvalue())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); free space there") from error


def read_probe(path: Path) -> StoredProbe:
    """The way back of `write_probe`; one of an earlier version has no step and counts as the first's."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            values = dict(archive)
        objective, step = str(values.pop(_OBJECTIVE)), int(values.pop(_STEP, np.asarray(1)))
        count = len({name.partition(".")[0] for name in values})
        rollouts = [_rebuilt(ScoredRollout, f"{index}.", values) for index in range(count)]
        return StoredProbe(objective=objective, step=step, rollouts=rollouts)
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise CheckpointError(
            f"{path}: is no probe of this version ({error}), so distill/gradient_coherence begins anew"
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
