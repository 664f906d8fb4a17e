"""The members of the model family and how each one is made, at full scale and at a tiny scale for tests.

student-base and teacher-big learn from the same imperfect demonstrations; teacher-post continues student-base by
expert iteration; teacher-other learns the other style from correct demonstrations.
"""

from __future__ import annotations

from dataclasses import dataclass

from testbed.architecture import BIG, SMALL, Size
from testbed.demonstrations import IMPERFECT, OTHER_STYLE, Recipe
from testbed.expert import Rounds
from testbed.measuring import LONG_MAX_TOKENS
from testbed.problems import LONG
from testbed.training import Schedule

POST_NAME = "teacher-post"
BASE_NAME = "student-base"


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A model trained from scratch on demonstrations; its number sets its seeds apart."""

    name: str
    number: int
    size: Size
    recipe: Recipe
    schedule: Schedule
    purpose: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Measuring:
    """How many held-out problems and samples a card is made of."""

    problems: int = 128
    samples_each: int = 4
    long_problems: int = 32
    long_samples_each: int = 1
    max_response_tokens: int = 192
    max_long_tokens: int = LONG_MAX_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Everything that sets the cost of a build."""

    members: tuple[Member, ...]
    rounds: Rounds
    measuring: Measuring
    tokenizer_demonstrations: int = 3000
    held_out_problems: int = 64


def _members(base: Schedule, big: Schedule, other: Schedule) -> tuple[Member, ...]:
    return (
        Member(
            name=BASE_NAME,
            number=0,
            size=SMALL,
            recipe=IMPERFECT,
            schedule=base,
            purpose="the student: pre-trained on imperfect demonstrations, so it forgets about every third carry",
        ),
        Member(
            name="teacher-big",
            number=1,
            size=BIG,
            recipe=IMPERFECT,
            schedule=big,
            purpose="a teacher of twice the size and the same pipeline, with the same fault as the student",
        ),
        Member(
            name="teacher-other",
            number=2,
            size=SMALL,
            recipe=OTHER_STYLE,
            schedule=other,
            purpose="an accurate teacher with another thinking pattern, trained on correct demonstrations",
        ),
    )


POST_PURPOSE = "student-base post-trained on verified answers of its own sampling; same thinking pattern, no fault"

FULL = Scale(
    members=_members(
        base=Schedule(updates=2000, learning_rate=2.5e-3),
        big=Schedule(updates=1400, learning_rate=2.5e-3),
        other=Schedule(updates=1800, learning_rate=2.5e-3),
    ),
    rounds=Rounds(),
    measuring=Measuring(),
)

_FAST = Schedule(updates=4, learning_rate=1e-3, warmup=2, max_tokens=1024, checkpoint_every=2)
# An untrained model seldom ends a response, so a test cuts them short.
_CUT = 12
FAST = Scale(
    members=_members(base=_FAST, big=_FAST, other=_FAST),
    rounds=Rounds(
        rounds=1,
        samples=(("1", 4), ("2", 2), ("3", 2), ("4", 2), (LONG, 2)),
        kept_per_level=2,
        epochs=1,
        max_response_tokens=_CUT,
        max_long_tokens=_CUT,
    ),
    measuring=Measuring(
        problems=4, samples_each=2, long_problems=1, long_samples_each=1, max_response_tokens=_CUT, max_long_tokens=_CUT
    ),
    tokenizer_demonstrations=400,
    held_out_problems=4,
)
