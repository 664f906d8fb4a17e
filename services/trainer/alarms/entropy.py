"""The student has become far more certain than either model was (5.2)."""

from services.trainer.alarms.config import EntropySettings
from services.trainer.alarms.contract import Finding
from services.trainer.alarms.history import History
from services.trainer.alarms.overlap import PRESENT_STEPS, START_STEPS, STUDENT_ENTROPY

TEACHER_ENTROPY = "distill/entropy_teacher"


def collapsing(history: History, settings: EntropySettings) -> Finding | None:
    """Student entropy below a share of the lower of both models' entropies at the start.

    Against the student's own start alone, every student that comes down to a sharp teacher would be an alarm.
    """
    start, now = history.first(STUDENT_ENTROPY, START_STEPS), history.last(STUDENT_ENTROPY, PRESENT_STEPS)
    if start is None or now is None:
        return None
    teacher = history.first(TEACHER_ENTROPY, START_STEPS)
    floor = settings.max_share * min(start.mean, teacher.mean if teacher else start.mean)
    if now.mean >= floor:
        return None
    beside = f", teacher {teacher.mean:.4g} then" if teacher else ""
    return Finding(
        evidence=f"student entropy {start.mean:.4g} ({start.span}) to {now.mean:.4g} nats ({now.span}){beside}",
        numbers={"entropy_start": start.mean, "entropy_now": now.mean, "floor": floor},
    )
