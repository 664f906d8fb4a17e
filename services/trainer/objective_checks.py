"""What an objective asks of the rest of a configuration. Light: no torch."""

from typing import TYPE_CHECKING, Any

from opd.types import Encoding
from services.trainer.alarms.contract import OF_A_TEACHER
from services.trainer.objectives.config import ObjectiveKind, Tail
from services.trainer.recipes.self_distillation.settings import TeacherKind

if TYPE_CHECKING:
    from services.trainer.config import TrainSettings

GRPO_GROUP = 8
"""Rollouts of a prompt in the paper's GRPO runs (A.1)."""
_OF_THE_TEACHERS_VIEW = (
    "teacher_tokenizer",
    "teacher_template",
    "teacher_chat_template_kwargs",
    "teacher_context",
    "teacher_context_column",
)
"""Settings of `data` that say what the teacher sees."""


def with_group_size(values: Any) -> Any:
    """Raw settings with the paper's group size where GRPO was chosen and no size given."""
    if not isinstance(values, dict):
        return values
    objective, rollout = values.get("objective"), values.get("rollout", {})
    if not (isinstance(objective, dict) and isinstance(rollout, dict) and objective.get("kind") == ObjectiveKind.GRPO):
        return values
    return values | {"rollout": {"rollouts_per_prompt": GRPO_GROUP} | rollout}


def check_objective(settings: "TrainSettings") -> None:
    """Raises `ValueError` naming the two settings that contradict each other, and the way out."""
    objective = settings.objective
    if objective.kind is ObjectiveKind.FULL_VOCABULARY:
        _check_reaches_hidden_states(settings)
    if objective.tail is Tail.BUCKET:
        _check_encoding(settings)
    if objective.estimates_from_samples:
        _check_whole_sampling(settings)
    if objective.uses_outcome and settings.rollout.rollouts_per_prompt < 2:
        raise ValueError(
            "rollout.rollouts_per_prompt=1: a verified answer is compared with the others of its prompt; give 2 or more"
        )
    if not objective.uses_teacher:
        _check_without_teacher(settings)
    _check_horizon(settings)


def _check_without_teacher(settings: "TrainSettings") -> None:
    """What is said of a teacher would be ignored where there is none."""
    kind, data = f"objective.kind={settings.objective.kind}", settings.data
    if settings.teachers or data.teacher_column:
        raise ValueError(f"{kind} has no teacher: remove [teachers] and data.teacher_column, or choose another kind")
    if settings.teacher.kind is not TeacherKind.POOL:
        raise ValueError(
            f"teacher.kind={settings.teacher.kind} with {kind}, which has no teacher: leave teacher.kind out, or "
            "choose another objective"
        )
    if settings.teacher.url:
        raise ValueError(f"teacher.url with {kind}, which asks no teacher: leave it out, or choose another objective")
    views = {name: getattr(data, name) for name in _OF_THE_TEACHERS_VIEW}
    ignored = [f"data.{name}" for name, value in views.items() if value not in (None, "")]
    if ignored:
        raise ValueError(
            f"{', '.join(ignored)} with {kind}, which has no teacher to read it: remove it, or choose another objective"
        )
    idle = [name for name in settings.alarms.stop if name in OF_A_TEACHER]
    if idle:
        raise ValueError(
            f"alarms.stop={', '.join(idle)} with {kind}: needs a teacher's scores and would never be raised; take it "
            "out of alarms.stop"
        )


def _check_horizon(settings: "TrainSettings") -> None:
    horizon, longest = settings.objective.horizon, settings.rollout.max_response_tokens
    if horizon is not None and horizon.start > longest:
        raise ValueError(
            f"objective.horizon.start={horizon.start} is above rollout.max_response_tokens={longest}, so it would "
            "leave nothing out: lower it, or leave the horizon out"
        )


def _check_reaches_hidden_states(settings: "TrainSettings") -> None:
    scheme = settings.teacher.url.partition("://")[0]
    if scheme not in ("grpc", "grpcs"):
        shown = f"{scheme}://..." if scheme else "(empty)"
        raise ValueError(
            f"objective.kind=full_vocabulary with teacher.url={shown}: hidden states "
            "travel over gRPC alone; set teacher.url to grpc://HOST:PORT"
        )


def _check_whole_sampling(settings: "TrainSettings") -> None:
    """A cut sampler never draws what the loss's student, who has all tokens, may say: its estimates are biased."""
    rollout = settings.rollout
    for name, value, whole in (("top_p", rollout.top_p, 1.0), ("top_k", rollout.top_k, -1)):
        if value != whole:
            raise ValueError(
                f"rollout.{name}={value} with objective.{settings.objective.estimates_from_samples} biases the "
                f"estimate, which is over all that the student may say: set rollout.{name}={whole}, or "
                "objective.kind=top_k with nothing that is learned from sampled tokens"
            )


def _check_encoding(settings: "TrainSettings") -> None:
    if settings.teacher.kind is not TeacherKind.POOL:
        # Nothing travels, so nothing is rounded.
        return
    for name, teacher in settings.teachers_by_name().items():
        if teacher.encoding is not Encoding.FLOAT32:
            field = f"teachers.{name}.encoding" if name else "teacher.encoding"
            raise ValueError(
                f"objective.tail=bucket with {field}={teacher.encoding}: the mass outside the support is what rounding "
                f"leaves of the rest; set {field}=float32"
            )
