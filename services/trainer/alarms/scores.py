"""Rules on what a position has to teach: too few ids, or a teacher without an opinion."""

from services.trainer.alarms.config import SupportSettings, UniformSettings
from services.trainer.alarms.contract import Finding
from services.trainer.alarms.history import History
from services.trainer.alarms.overlap import PRESENT_STEPS

SMALL_SUPPORTS, UNIFORM_ROWS = "loss/small_support_fraction", "distill/uniform_teacher_fraction"


def small_supports(history: History, settings: SupportSettings) -> Finding | None:
    """Too many positions whose support has no id, or one: the exact gradient is 0 there."""
    window = history.last(SMALL_SUPPORTS, PRESENT_STEPS)
    if window is None or window.mean <= settings.max_fraction:
        return None
    return Finding(
        evidence=f"{window.mean:.1%} of positions have fewer than two ids in their support ({window.span})",
        numbers={"small_support_fraction": window.mean},
    )


def uniform_teacher(history: History, settings: UniformSettings) -> Finding | None:
    """The teacher's rows are flat: at the very first step already, since its scores only do harm."""
    window = history.last(UNIFORM_ROWS, 1)
    if window is None or window.mean <= settings.max_fraction:
        return None
    return Finding(
        evidence=f"at {window.mean:.1%} of positions the teacher spreads evenly over its vocabulary ({window.span})",
        numbers={"uniform_teacher_fraction": window.mean},
    )
