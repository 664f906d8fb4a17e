"""Where a run's teacher is: in a pool, or held by the trainer itself. Light: no torch."""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from opd.settings import Settings


class TeacherKind(StrEnum):
    POOL = "pool"
    """A teacher service scores."""
    SELF = "self"
    """The student's own weights score: those the run began with, or their moving average."""
    FOLDER = "folder"
    """A model folder is loaded into the trainer: for small models and short trials."""


class HeldTeacherSettings(Settings):
    """The part of a teacher's settings that says whether there is a service at all."""

    kind: TeacherKind = TeacherKind.POOL
    """`pool`; `self` for self-distillation (say, with `data.teacher_context`); `folder` loads `teacher.model` here."""
    model: str = ""
    """Hugging Face folder (safetensors) or hub name of a teacher of `kind=folder`."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of a teacher of `kind=self`: after each step it becomes decay * teacher + (1 - decay) * student; unset keeps the
    weights the run began with."""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind is TeacherKind.FOLDER and not self.model:
            raise ValueError("teacher.kind=folder without teacher.model: nothing says which; set teacher.model")
        if self.kind is not TeacherKind.FOLDER and self.model:
            raise ValueError(
                f"teacher.model={self.model} with kind={self.kind}: would be ignored; set teacher.kind=folder, "
                "or leave it out"
            )
        if self.kind is not TeacherKind.SELF and self.ema_decay is not None:
            raise ValueError(
                f"teacher.ema_decay={self.ema_decay} with kind={self.kind}: only the student's own weights can follow "
                "it; set teacher.kind=self, or leave it out"
            )
        return self


def check_held_teacher(teacher: HeldTeacherSettings, *, url: str, is_full_vocabulary: bool, num_named: int) -> None:
    """`ValueError` for a run that a teacher held here cannot serve; `url` is where a pool would be."""
    if teacher.kind is TeacherKind.POOL:
        return
    if url:
        raise ValueError(
            f"teacher.url with teacher.kind={teacher.kind}: would be ignored, the trainer holds the teacher itself; "
            "leave it out or set teacher.kind=pool"
        )
    if is_full_vocabulary:
        raise ValueError(
            f"teacher.kind={teacher.kind} with objective.kind=full_vocabulary: hidden states come from a service over "
            "gRPC alone; choose another objective, or serve the teacher"
        )
    if num_named:
        raise ValueError(
            f"teacher.kind={teacher.kind} with [teachers]: several teachers are pools; leave [teachers] out or set "
            "teacher.kind=pool"
        )
