"""Short real training runs, one per teacher: the only thing that tells whether a teacher has something new (3.2).

A pilot is a training run like any other, in a folder of its own, with its metrics and checkpoints; one that was cut off
goes on, one that has ended is not repeated.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from services.trainer.assembly import CHECKPOINTS, assemble
from services.trainer.checkpoint import CheckpointStore
from services.trainer.config import TrainSettings
from services.trainer.evaluation.estimates import Estimate
from services.trainer.recipes.preflight.estimates import slope
from services.trainer.recipes.preflight.rules import PilotSlopes
from services.trainer.recipes.preflight.settings import PreflightSettings
from services.trainer.recipes.preflight.teachers import MetTeacher, train_settings
from services.trainer.run_log import read_steps
from services.trainer.stop import StopSignal


def run_pilot(
    settings: PreflightSettings,
    teacher: MetTeacher,
    starts_from: Mapping[str, Any],
    stop: StopSignal,
    say: Callable[[str], None],
) -> Path:
    """Takes the steps that are missing; the run's folder. `starts_from` as in `pilot_settings`.

    Raises what a training run raises.
    """
    training = pilot_settings(settings, teacher, starts_from)
    # The student that is to be measured, and not the last metrics, which are written before it.
    latest = CheckpointStore(training.run_dir / CHECKPOINTS, keep_last=1).latest()
    if latest is None or latest.state.step < settings.pilot.steps:
        say(f"pilot of {settings.pilot.steps} steps with {teacher.name}")
        run = assemble(training, stop, resume=training.run_dir.exists())
        try:
            run.train()
        finally:
            run.close()
    return training.run_dir


def trained_student(run_dir: Path) -> Path:
    """The model folder that a finished pilot left."""
    return CheckpointStore(run_dir / CHECKPOINTS, keep_last=1).folders()[-1]


def pilot_settings(settings: PreflightSettings, teacher: MetTeacher, starts_from: Mapping[str, Any]) -> TrainSettings:
    """The run's folder carries a hash of everything it is told and of what lies behind the paths in it.

    That is the teacher's fingerprint and `starts_from`, the student and the prompts: another student saved under the
    same name begins another run.
    """
    training = train_settings(settings, teacher.settings)
    training = training.model_copy(
        update={
            "steps": settings.pilot.steps,
            "optim": training.optim.model_copy(
                update={"warmup_steps": min(settings.pilot.warmup_steps, settings.pilot.steps)}
            ),
        }
    )
    told = training.model_dump(mode="json", exclude={"run_dir"})
    behind = {"teacher": teacher.info.fingerprint if teacher.info else "", **starts_from}
    digest = hashlib.sha256(json.dumps([told, behind], sort_keys=True).encode()).hexdigest()[:12]
    return training.model_copy(update={"run_dir": settings.output_dir / f"pilot-{teacher.name}-{digest}"})


def pilot_slopes(run_dir: Path, gain: Estimate | None, *, seed: int) -> PilotSlopes:
    """Change per step of each curve, with its interval; a curve that was not measured has none."""
    records = read_steps(run_dir)

    def of(key: str) -> Estimate | None:
        values = [float(record[key]) for record in records if key in record]
        return slope(values, seed=seed) if len(values) == len(records) else None

    return PilotSlopes(
        num_steps=len(records),
        reverse_kl=of("loss/reverse_kl"),
        overlap_ratio=of("distill/overlap_ratio"),
        accuracy=of("outcome/accuracy"),
        gain=gain,
    )
