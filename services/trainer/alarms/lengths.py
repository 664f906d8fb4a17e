"""Rules on how responses end: too late, or in a way the teacher does not know (6.1)."""

from services.trainer.alarms.config import EosSettings, LengthSettings
from services.trainer.alarms.contract import Finding
from services.trainer.alarms.history import History
from services.trainer.alarms.overlap import PRESENT_STEPS, START_STEPS

LENGTH, TRUNCATED = "rollout/response_length", "rollout/truncated_fraction"
STUDENT_EOS, TEACHER_EOS = "rollout/eos_logprob_student", "rollout/eos_logprob_teacher"


def exploding(history: History, settings: LengthSettings) -> Finding | None:
    """Mean length many times that of the start, or most responses cut off where that was not so at the start."""
    start, now = history.first(LENGTH, START_STEPS), history.last(LENGTH, PRESENT_STEPS)
    cut_start, cut_now = history.first(TRUNCATED, START_STEPS), history.last(TRUNCATED, PRESENT_STEPS)
    if start is None or now is None or cut_start is None or cut_now is None:
        return None
    is_longer = now.mean > settings.factor * start.mean
    is_cut = cut_now.mean > settings.max_truncated and cut_start.mean < cut_now.mean / 2
    if not is_longer and not is_cut:
        return None
    return Finding(
        evidence=(
            f"mean response length {start.mean:.0f} ({start.span}) to {now.mean:.0f} tokens ({now.span}), cut off at "
            f"the limit {cut_start.mean:.1%} to {cut_now.mean:.1%}"
        ),
        numbers={"length_start": start.mean, "length_now": now.mean}
        | {"truncated_start": cut_start.mean, "truncated_now": cut_now.mean},
    )


def eos_mismatch(history: History, settings: EosSettings) -> Finding | None:
    """The teacher finds the EOS that the student sampled far less likely than the student does."""
    student, teacher = history.last(STUDENT_EOS, PRESENT_STEPS), history.last(TEACHER_EOS, PRESENT_STEPS)
    if student is None or teacher is None or student.mean - teacher.mean <= settings.max_gap_nats:
        return None
    return Finding(
        evidence=(
            f"log-prob of the sampled EOS {student.mean:.2f} by the student and {teacher.mean:.2f} by the teacher "
            f"({student.span})"
        ),
        numbers={"eos_logprob_student": student.mean, "eos_logprob_teacher": teacher.mean},
    )
