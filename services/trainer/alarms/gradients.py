"""Rules on the gradient: small although there is much to learn (6.2), or suddenly many times the usual (6.1)."""

from services.trainer.alarms.config import CancellingSettings, SpikeSettings
from services.trainer.alarms.contract import Finding
from services.trainer.alarms.history import History
from services.trainer.alarms.overlap import ADVANTAGE, START_STEPS

GRAD_NORM, COHERENCE = "optim/grad_norm", "distill/gradient_coherence"
_PRESENT_STEPS = 10
_MIN_USUAL = 8


def cancelling(history: History, settings: CancellingSettings) -> Finding | None:
    """The advantage is as large as at the start or larger, the gradient norm smaller, and their ratio a fraction.

    A norm alone says nothing across models, so a run is compared with itself; a norm that has grown, if less than the
    advantage, is no small one. 6.2 takes cancellation between rollouts
    for the cause; `distill/gradient_coherence` is told where it is measured.
    """
    start, now = history.first(ADVANTAGE, START_STEPS), history.last(ADVANTAGE, _PRESENT_STEPS)
    norm_start, norm_now = history.first(GRAD_NORM, START_STEPS), history.last(GRAD_NORM, _PRESENT_STEPS)
    if start is None or now is None or norm_start is None or norm_now is None:
        return None
    large_then, large_now = abs(start.mean), abs(now.mean)
    if not large_then or not norm_start.median or large_now < settings.min_advantage * large_then:
        return None
    if norm_now.median > norm_start.median:
        return None
    ratio = (norm_now.median / large_now) / (norm_start.median / large_then)
    if ratio > settings.max_ratio:
        return None
    coherence = history.last(COHERENCE, 1)
    beside = f", gradient coherence {coherence.mean:.3f} at {coherence.span}" if coherence else ""
    return Finding(
        evidence=(
            f"overlap advantage {start.mean:.4g} ({start.span}) and {now.mean:.4g} ({now.span}) while the gradient "
            f"norm went from {norm_start.median:.4g} to {norm_now.median:.4g}{beside}"
        ),
        numbers={"advantage_start": start.mean, "advantage_now": now.mean, "norm_start": norm_start.median}
        | {"norm_now": norm_now.median, "ratio": ratio},
    )


def spike(history: History, settings: SpikeSettings) -> Finding | None:
    """The last gradient norm is many times the median of those before it."""
    count = min(settings.window_steps, len(history.records) - 1)
    window = history.last(GRAD_NORM, count + 1) if count >= _MIN_USUAL else None
    if window is None:
        return None
    usual, last = window.part(None, -1), window.part(-1, None)
    # Where no group has learned anything, as GRPO's may, the usual gradient is 0 and every other many times that.
    if not usual.median or last.mean < settings.factor * usual.median:
        return None
    return Finding(
        evidence=f"gradient norm {last.mean:.4g} at {last.span}, median {usual.median:.4g} over {usual.span}",
        numbers={"norm": last.mean, "usual": usual.median},
    )
