"""Panels over training steps, with alarms as marks on their upper edge, and where the time of a step went."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from services.trainer.report.layout import (
    COLORS,
    HATCHES,
    LINE_STYLES,
    dress,
    dress_steps,
    finish,
    grid,
    lines_room,
    look,
    name_missing,
    style_legend,
)
from services.trainer.report.runs import Run, Series

_MAX_MARKS = 8
"""Alarms named below a figure; the page lists them all."""
FRACTION = "fraction"
"""The label of panels that begin at 0, so that nothing and hardly anything look the same."""
_MIN_FRACTION = 0.05
_MEAN_STEPS, _MANY_POINTS = 5, 30
_MEAN_NOTE = f"Of series longer than {_MANY_POINTS} points, the thick line is the running mean over {_MEAN_STEPS}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One metric of a panel; `label` tells it from the panel's others and may be empty when it is alone."""

    key: str
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One pair of axes over training steps."""

    title: str
    y_label: str
    lines: tuple[Line, ...]


def draw_over_steps(runs: Sequence[Run], panels: Sequence[Panel], title: str, path: Path) -> bool:
    """Draws the panels that have data; False, and no file, when none has."""
    shown = [panel for panel in panels if any(run.series(line.key) for run in runs for line in panel.lines)]
    if not shown:
        path.unlink(missing_ok=True)
        return False
    series = [run.series(line.key) for run in runs for panel in shown for line in panel.lines]
    is_long = any(found and len(found.values) > _MANY_POINTS for found in series)
    marks = [*_mark_lines(runs), *([_MEAN_NOTE] if is_long else [])]
    figure, axes = grid(len(shown), title, room_below=lines_room(len(marks)))
    for panel, ax in zip(shown, axes, strict=True):
        missing = [run.name for index, run in enumerate(runs) if not _draw_run(ax, index, run, panel)]
        dress_steps(ax, panel.title, panel.y_label)
        if panel.y_label == FRACTION:
            ax.set_ylim(bottom=0, top=max(_MIN_FRACTION, ax.get_ylim()[1]))
        name_missing(ax, missing)
        if len(panel.lines) > 1:
            style_legend(ax, [line.label for line in panel.lines])
        _mark_alarms(ax, runs)
    finish(figure, runs, path, lines=marks)
    return True


def _draw_run(ax: Axes, index: int, run: Run, panel: Panel) -> bool:
    has_any = False
    for line, style in zip(panel.lines, LINE_STYLES, strict=False):
        series = run.series(line.key)
        if series is not None:
            _draw_series(ax, series, {"linestyle": style} | look(index, len(series.steps)))
            has_any = True
    return has_any


def _draw_series(ax: Axes, series: Series, style: dict[str, Any]) -> None:
    values = series.values
    if len(values) > _MANY_POINTS:
        ax.plot(series.steps, values, linewidth=0.8, alpha=0.35, color=style["color"], linestyle=style["linestyle"])
        # At both ends the mean is over what is there.
        sums = np.convolve(values, np.ones(_MEAN_STEPS), mode="same")
        values = list(sums / np.convolve(np.ones(len(values)), np.ones(_MEAN_STEPS), mode="same"))
    ax.plot(series.steps, values, **style)


def _mark_alarms(ax: Axes, runs: Sequence[Run]) -> None:
    """A dashed line per alarm in its run's colour, with its number beside its upper end."""
    for index, run in enumerate(runs):
        color = COLORS[index % len(COLORS)]
        for alarm in run.alarms:
            ax.axvline(alarm.step, color=color, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7, zorder=1)
            ax.annotate(
                str(alarm.number), (alarm.step, 1.0), xycoords=("data", "axes fraction"), xytext=(2, -1),
                textcoords="offset points", ha="left", va="top", fontsize=7, fontweight="bold", color=color,
            )  # fmt: skip


def _mark_lines(runs: Sequence[Run]) -> list[str]:
    alarms = [(alarm, run.name) for run in runs for alarm in run.alarms]
    named = [
        f"{alarm.number}  alarm {alarm.name}" + (f" of {name}" if len(runs) > 1 else "") + f" at step {alarm.step}"
        for alarm, name in alarms[:_MAX_MARKS]
    ]
    rest = len(alarms) - len(named)
    return [*named, f"and {rest} more, listed on the page"] if rest else named


def draw_timing(runs: Sequence[Run], title: str, path: Path) -> bool:
    """Mean seconds per phase as stacked bars, and tokens per second over steps; False when no run has times."""
    phases = list(dict.fromkeys(key for run in runs for key in run.keys("timing") if _is_phase(key)))
    if not phases:
        path.unlink(missing_ok=True)
        return False
    figure, (bars, speed) = grid(2, title, room_below=0.5)
    left = np.zeros(len(runs))
    rows = list(range(len(runs)))
    for number, phase in enumerate(phases):
        found = [run.series(phase) for run in runs]
        widths = np.array([np.mean(series.values) if series else 0.0 for series in found])
        style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "hatch": HATCHES[number % len(HATCHES)]}
        bars.barh(rows, widths, left=left, height=0.5, edgecolor="white", label=_phase_name(phase), **style)
        left += widths
    bars.set_yticks([])
    for row, run in enumerate(runs):
        # Above its bar rather than beside it, since a name may be longer than any margin.
        bars.text(0, row - 0.28, run.name, fontsize=8, va="bottom", parse_math=False)
    bars.set_ylim(len(runs) - 0.6, -0.75)
    dress(bars, "Phases of a step", "mean seconds per step", "")
    bars.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    for index, run in enumerate(runs):
        series = run.series("timing/tokens_per_second")
        if series is not None:
            speed.plot(series.steps, series.values, **look(index, len(series.steps)))
    dress_steps(speed, "Speed", "response tokens per second")
    finish(figure, runs, path)
    return True


def _is_phase(key: str) -> bool:
    return not key.endswith("_per_second") and _phase_name(key) != "step"


def _phase_name(key: str) -> str:
    return key.removeprefix("timing/").removesuffix("_s").replace("_", " ")
