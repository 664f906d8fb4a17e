"""The teachers of a preflight: named, opened, and met as a training run would meet them.

A teacher that cannot teach this student is no error here: that it was refused, and why, is what one wanted to know.
"""

import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from opd.errors import ConfigError, UnsupportedError, VocabularyMismatchError
from opd.settings import check_settings
from opd.types import Encoding, TeacherInfo
from opd.vocabulary import check_same_vocabulary
from services.trainer.config import ONLY_TEACHER, TeacherSettings, TrainSettings
from services.trainer.models import LoadedModel, load_model
from services.trainer.recipes.preflight.prompt_sets import data_settings
from services.trainer.recipes.preflight.settings import PreflightSettings
from services.trainer.recipes.self_distillation.settings import TeacherKind
from services.trainer.recipes.self_distillation.teacher import LocalTeacher
from services.trainer.teacher_links import TeacherLink, build_router, connect_teachers
from services.trainer.teachers import TeacherRouter

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[a-z0-9-]{1,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedTeacher:
    """A teacher as it was given on the command line."""

    name: str
    """Unique among the teachers of the preflight."""
    settings: TeacherSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class MetTeacher:
    """A teacher after the handshake."""

    name: str
    settings: TeacherSettings
    info: TeacherInfo | None
    """None for one that was refused."""
    router: TeacherRouter | None
    loaded: LoadedModel | None
    """Where it was loaded here; a pool's answers nothing but scores."""
    warnings: tuple[str, ...] = ()
    """Template and EOS (5.2)."""
    refusal: str = ""
    """Why it cannot teach this student."""


def name_teachers(settings: PreflightSettings) -> list[NamedTeacher]:
    """Names from folders and pools, equal ones told apart by a number; `ConfigError` for the same teacher twice."""
    if len(set(settings.teachers)) < len(settings.teachers):
        raise ConfigError(f"teachers={', '.join(settings.teachers)}: one is named twice; give each once")
    named: list[NamedTeacher] = []
    for given in settings.teachers:
        teacher = _settings_of(given, settings)
        base = teacher.pool if teacher.kind is TeacherKind.POOL else Path(given).name
        count = sum(other.name.partition("~")[0] == base for other in named)
        named.append(NamedTeacher(name=f"{base}~{count + 1}" if count else base, settings=teacher))
    return named


def _settings_of(given: str, settings: PreflightSettings) -> TeacherSettings:
    url, _, pool = given.partition("#") if "://" in given else ("", "", given)
    if not url and (Path(given).is_dir() or not _NAME.fullmatch(given)):
        return TeacherSettings(kind=TeacherKind.FOLDER, model=given)
    # What is to be compared with a teacher loaded here should not be rounded on its way.
    return TeacherSettings(
        url=url, pool=pool or "teacher", tenant=settings.tenant, wait_s=settings.wait_s, encoding=Encoding.FLOAT32
    )


def train_settings(settings: PreflightSettings, teacher: TeacherSettings) -> TrainSettings:
    """The training run that the preflight stands before, with one of the teachers."""
    return check_settings(
        TrainSettings,
        {
            "student": {
                "model": settings.student,
                "device": settings.device,
                "max_micro_batch_tokens": settings.max_micro_batch_tokens,
            },
            "teacher": teacher,
            "data": data_settings(settings),
            "rollout": {
                "prompts_per_step": settings.pilot.prompts_per_step,
                "rollouts_per_prompt": settings.pilot.rollouts_per_prompt,
                "temperature": settings.temperature,
                "max_prompt_tokens": settings.max_prompt_tokens,
                "max_response_tokens": settings.max_response_tokens,
                "max_slots": settings.max_slots,
            },
            "objective": settings.objective,
            "optim": {"lr": settings.pilot.lr, "warmup_steps": settings.pilot.warmup_steps},
            "http": {"enabled": False},
            "seed": settings.seed,
        },
    )


def meet_teachers(
    settings: PreflightSettings, named: Sequence[NamedTeacher], student: LoadedModel, opened: ExitStack
) -> list[MetTeacher]:
    """Loads or connects each and shakes hands; connections close with `opened`.

    Another id map, missing capabilities and limits too low are refusals of that teacher; a pool without a replica or a
    folder that cannot be loaded ends the preflight.
    """
    return [_meet(settings, teacher, student, opened) for teacher in named]


def _meet(settings: PreflightSettings, teacher: NamedTeacher, student: LoadedModel, opened: ExitStack) -> MetTeacher:
    training = train_settings(settings, teacher.settings)
    loaded = None
    if teacher.settings.kind is TeacherKind.FOLDER:
        loaded = load_model(teacher.settings.model, device=settings.device)
        held = LocalTeacher(loaded, pool=teacher.settings.pool)
        links = {ONLY_TEACHER: TeacherLink(settings=teacher.settings, client=held)}
    else:
        links = connect_teachers(training, opened)
    router = build_router(training, links, vocabulary=student.vocabulary, student_name=student.name)
    try:
        router.shake_hands(wait_s=settings.wait_s)
    except (VocabularyMismatchError, UnsupportedError) as error:
        return MetTeacher(
            name=teacher.name, settings=teacher.settings, info=None, router=None, loaded=loaded, refusal=error.message
        )
    info = router.info(ONLY_TEACHER)
    return MetTeacher(
        name=teacher.name,
        settings=teacher.settings,
        info=info,
        router=router,
        loaded=loaded,
        warnings=tuple(check_same_vocabulary(student.vocabulary, student.name, info)),
    )
