"""Rules on what the two models share: it stands still, shrinks, collapses or holds too little (3, 4, 6.1, C.2)."""

import math
import statistics

from services.trainer.alarms.config import CollapseSettings, DivergenceSettings, MassSettings, StagnationSettings
from services.trainer.alarms.contract import Finding
from services.trainer.alarms.history import History, Window, bucket_means

START_STEPS, PRESENT_STEPS = 5, 3
OVERLAP, ADVANTAGE, ENTROPY_GAP = "distill/overlap_ratio", "distill/overlap_advantage", "distill/entropy_gap"
REVERSE_KL, STUDENT_ENTROPY = "loss/reverse_kl", "distill/entropy_student"
STUDENT_MASS, TEACHER_MASS = "distill/overlap_mass_student", "distill/overlap_mass_teacher"


def stagnating(history: History, settings: StagnationSettings) -> Finding | None:
    """Overlap, advantage and entropy gap all stand still over the window, the reverse KL not far below its start.

    In a run that works all three improve (Fig 6); one that has converged stands still as well, at a low divergence.
    What is within two standard errors is no improvement.
    """
    overlap = history.last(OVERLAP, settings.window_steps)
    start, now = history.first(REVERSE_KL, START_STEPS), history.last(REVERSE_KL, START_STEPS)
    if overlap is None or start is None or now is None or now.mean < settings.min_divergence * start.mean:
        return None
    before, after = _thirds(overlap)
    if after.mean - before.mean > max(settings.min_gain, _doubt(before, after)):
        return None
    told = [f"overlap ratio {before.mean:.4f} to {after.mean:.4f} over {overlap.span}"]
    for key, name in ((ADVANTAGE, "advantage"), (ENTROPY_GAP, "entropy gap")):
        window = history.last(key, settings.window_steps)
        if window is None:
            continue
        first, last = _thirds(window)
        gain = abs(first.mean) - abs(last.mean)
        if gain > max(settings.min_improvement * abs(first.mean), _doubt(first, last)):
            return None
        told.append(f"{name} {first.mean:.4g} to {last.mean:.4g}")
    told.append(f"reverse KL {start.mean:.4g} at the start and {now.mean:.4g} now")
    numbers = {"overlap_before": before.mean, "overlap_after": after.mean, "reverse_kl_start": start.mean}
    return Finding(evidence=", ".join(told), numbers=numbers | {"reverse_kl_now": now.mean})


def _thirds(window: Window) -> tuple[Window, Window]:
    third = len(window.values) // 3
    return window.part(None, third), window.part(-third, None)


def _doubt(first: Window, last: Window) -> float:
    """Two standard errors of the difference of two means: steps of few prompts go up and down by chance."""
    return 2 * math.sqrt(sum(statistics.variance(part.values) / len(part.values) for part in (first, last)))


def diverging(history: History, settings: DivergenceSettings) -> Finding | None:
    """The reverse KL on the student's ids is far above its start, and not by chance."""
    start, now = history.first(REVERSE_KL, START_STEPS), history.last(REVERSE_KL, 2 * START_STEPS)
    if start is None or now is None or now.mean < settings.factor * start.mean:
        return None
    if now.mean - start.mean <= _doubt(start, now):
        return None
    return Finding(
        evidence=f"reverse KL {start.mean:.4g} ({start.span}) to {now.mean:.4g} nats per position ({now.span})",
        numbers={"reverse_kl_start": start.mean, "reverse_kl_now": now.mean},
    )


def collapsing(history: History, settings: CollapseSettings) -> Finding | None:
    """Overlap is far below the best of the window, and entropy has risen at the back of the response, there the most.

    The pattern of Figs 12 and 13: collapse begins in the last positions and moves forward.
    """
    overlap = _longest(history, settings.window_steps)
    if overlap is None:
        return None
    best, now = _best(overlap.part(None, -PRESENT_STEPS)), overlap.part(-PRESENT_STEPS, None)
    if best.mean - now.mean < settings.min_drop:
        return None
    rises = _entropy_rises(history, best, now, settings.min_positions)
    if len(rises) < 2:
        return None
    (_, front_then, front_now), (bucket, back_then, back_now) = rises[0], rises[-1]
    rise = back_now - back_then
    if rise < settings.min_rise * back_then or rise <= front_now - front_then:
        return None
    return Finding(
        evidence=(
            f"overlap ratio {best.mean:.4f} ({best.span}) to {now.mean:.4f} ({now.span}), student entropy "
            f"{back_then:.4g} to {back_now:.4g} at positions from {bucket}, {front_then:.4g} to {front_now:.4g} at the "
            "front"
        ),
        numbers={
            "overlap_best": best.mean, "overlap_now": now.mean, "entropy_back_then": back_then,
            "entropy_back_now": back_now, "entropy_front_then": front_then, "entropy_front_now": front_now,
        },
    )  # fmt: skip


def _longest(history: History, max_steps: int) -> Window | None:
    """The last `max_steps` overlaps, or as many as there are once a best and a present can be told apart."""
    count = min(max_steps, sum(1 for record in history.records[-max_steps:] if OVERLAP in record))
    return history.last(OVERLAP, count) if count >= 2 * PRESENT_STEPS else None


def _best(window: Window) -> Window:
    """The three consecutive steps with the highest mean."""
    starts = range(len(window.values) - PRESENT_STEPS + 1)
    return max((window.part(start, start + PRESENT_STEPS) for start in starts), key=lambda part: part.mean)


def _entropy_rises(history: History, then: Window, now: Window, min_positions: int) -> list[tuple[int, float, float]]:
    """Start of bucket, entropy then and now, of every bucket with enough positions at both times."""
    records = history.at(now.steps)
    edges = records[-1].get("distill/position_edges") or []
    means_then, means_now = (bucket_means(part, STUDENT_ENTROPY) for part in (history.at(then.steps), records))
    return [
        (int(edge), before, after)
        for edge, (before, count_before), (after, count_after) in zip(edges, means_then, means_now, strict=False)
        if min(count_before, count_after) >= min_positions
    ]


def low_mass(history: History, settings: MassSettings) -> Finding | None:
    """The advantage on the shared ids is small, but the shared ids hold too little of a model's probability (C.2)."""
    windows = [history.last(key, PRESENT_STEPS) for key in (ADVANTAGE, STUDENT_MASS, TEACHER_MASS)]
    advantage, student, teacher = windows
    if advantage is None or student is None or teacher is None or abs(advantage.mean) > settings.max_advantage:
        return None
    if min(student.mean, teacher.mean) >= settings.min_mass:
        return None
    return Finding(
        evidence=(
            f"overlap advantage {advantage.mean:.4g} looks good while the overlap holds {student.mean:.3f} of the "
            f"student's and {teacher.mean:.3f} of the teacher's probability ({advantage.span})"
        ),
        numbers={"advantage": advantage.mean, "mass_student": student.mean, "mass_teacher": teacher.mean},
    )
