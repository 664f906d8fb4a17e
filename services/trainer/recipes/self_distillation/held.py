"""From the configuration to the teacher that the trainer holds itself, new or as a checkpoint left it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from torch import Tensor

from services.trainer.checkpoint import Checkpoint
from services.trainer.config import TeacherSettings, TrainSettings
from services.trainer.models import LoadedModel, load_model
from services.trainer.recipes.self_distillation.moving_average import FollowedWeights, MovingAverageTeacher
from services.trainer.recipes.self_distillation.settings import TeacherKind
from services.trainer.recipes.self_distillation.teacher import LocalTeacher
from services.trainer.weights import WeightPublisher

TEACHER_STATE = "moving_average"
"""Name of the average's tensors in a checkpoint."""
_InStep = Callable[[], AbstractContextManager[None]]


def held_teacher(
    settings: TrainSettings, student: LoadedModel, checkpoint: Checkpoint | None, *, in_step: _InStep = nullcontext
) -> LocalTeacher | None:
    """None for a run whose teacher is a pool. `in_step` as for `MovingAverageTeacher`.

    The student's own initial weights are read again rather than copied, so that a resumed run, whose student has moved
    on, begins with the same teacher. Raises `ConfigError` as `load_model`, `CheckpointError` for an average that is not
    there or of another model.
    """
    teacher, row_chunk = settings.teacher, settings.student.row_chunk
    match teacher.kind:
        case TeacherKind.POOL:
            return None
        case TeacherKind.FOLDER:
            loaded = load_model(teacher.model, device=settings.student.device)
            return LocalTeacher(loaded, pool=teacher.pool, row_chunk=row_chunk)
        case TeacherKind.SELF:
            initial = load_model(settings.student.model, device=settings.student.device)
            return _self_teacher(teacher, initial, student, checkpoint, row_chunk=row_chunk, in_step=in_step)


def _self_teacher(
    teacher: TeacherSettings,
    initial: LoadedModel,
    student: LoadedModel,
    checkpoint: Checkpoint | None,
    *,
    row_chunk: int,
    in_step: _InStep,
) -> LocalTeacher:
    initial.model.requires_grad_(False)
    own = replace(initial, name=f"{initial.name} (itself)")
    if teacher.ema_decay is None:
        return LocalTeacher(own, pool=teacher.pool, row_chunk=row_chunk)
    decay, pool = teacher.ema_decay, teacher.pool
    average = MovingAverageTeacher(own, student.model, pool=pool, decay=decay, row_chunk=row_chunk, in_step=in_step)
    if checkpoint is not None:
        average.load_state_tensors(checkpoint.extra_tensors(TEACHER_STATE), checkpoint.state.step)
    return average


def followed(weights: WeightPublisher, teacher: LocalTeacher | None) -> WeightPublisher:
    """The publisher, with the teacher behind it where that is a moving average."""
    return FollowedWeights(weights, teacher) if isinstance(teacher, MovingAverageTeacher) else weights


def extra_state(teacher: LocalTeacher | None) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint has to hold of the teacher."""
    return {TEACHER_STATE: teacher.state_tensors()} if isinstance(teacher, MovingAverageTeacher) else {}
