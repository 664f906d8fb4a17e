"""Puts panels on paper: one colour and marker per run, one line style per quantity, legible without colour.

Colours are those of Okabe and Ito, told apart by colour-blind readers too. No pyplot: figures are objects of their own
and leave no state behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from opd.errors import ConfigError
from services.trainer.diagnostics.step import POSITION_EDGES_KEY
from services.trainer.report.runs import Record, Run

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
_PANEL_INCHES = (4.4, 2.4)
_LEFT, _RIGHT, _ABOVE, _BELOW, _BETWEEN_COLUMNS, _BETWEEN_ROWS = 0.85, 0.2, 0.75, 0.95, 0.95, 0.95
"""Inches around and between panels: room for tick labels, axis labels, titles and the legend of the runs."""
_DOTS_PER_INCH = 100
_NUM_MARKERS = 12
_POSITION_LABEL = "position in the response (start of bucket, tokens)"


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
    figure, axes = _grid(len(shown), title)
    for panel, ax in zip(shown, axes, strict=True):
        missing = [run.name for index, run in enumerate(runs) if not _draw_run(ax, index, run, panel)]
        _dress_steps(ax, panel.title, panel.y_label)
        _name_missing(ax, missing)
        if len(panel.lines) > 1:
            _style_legend(ax, [line.label for line in panel.lines])
    _finish(figure, runs, path)
    return True


def _draw_run(ax: Axes, index: int, run: Run, panel: Panel) -> bool:
    has_any = False
    for line, style in zip(panel.lines, LINE_STYLES, strict=False):
        series = run.series(line.key)
        if series is not None:
            ax.plot(series.steps, series.values, linestyle=style, **_look(index, len(series.steps)))
            has_any = True
    return has_any


def draw_by_position(runs: Sequence[Run], metrics: Sequence[tuple[str, str, str]], title: str, path: Path) -> bool:
    """One panel per metric by position bucket, and one with the number of positions; False when nothing is known."""
    shown = [metric for metric in metrics if any(run.arrays(f"{metric[0]}/by_position") for run in runs)]
    if not shown:
        path.unlink(missing_ok=True)
        return False
    figure, axes = _grid(len(shown) + 1, title)
    for (key, name, y_label), ax in zip(shown, axes[:-1], strict=True):
        missing = _draw_buckets(ax, runs, f"{key}/by_position")
        _dress(ax, name, _POSITION_LABEL, y_label)
        _name_missing(ax, missing)
        _style_legend(ax, ["last step", "first step"], ("-", ":"))
    counted, name, _ = shown[0]
    _draw_buckets(axes[-1], runs, f"{counted}/by_position/count")
    axes[-1].set_yscale("log")
    _dress(axes[-1], f"Positions behind {name.lower()}", _POSITION_LABEL, "count")
    _finish(figure, runs, path)
    return True


def _draw_buckets(ax: Axes, runs: Sequence[Run], key: str) -> list[str]:
    """Draws first and last step of every run over evenly spaced buckets; the names of the runs without any."""
    drawn = []
    for index, run in enumerate(runs):
        records = run.arrays(key)
        chosen = [(records[0], ":"), (records[-1], "-")] if len(records) > 1 else [(record, "-") for record in records]
        drawn += [(index, style, _known_buckets(run, record, key)) for record, style in chosen]
    edges = sorted({edge for _, _, known in drawn for edge, _ in known})
    for index, style, known in drawn:
        places = [edges.index(edge) for edge, _ in known]
        ax.plot(places, [value for _, value in known], linestyle=style, **_look(index, len(known)))
    ax.set_xticks(range(len(edges)), [f"{edge:g}" for edge in edges])
    ax.tick_params(axis="x", labelrotation=45)
    with_data = {index for index, _, _ in drawn}
    return [run.name for index, run in enumerate(runs) if index not in with_data]


def _known_buckets(run: Run, record: Record, key: str) -> list[tuple[float, float]]:
    """Bucket starts with the values of the buckets that anything fell into."""
    edges, values = record.get(POSITION_EDGES_KEY), record.get(key)
    if not isinstance(edges, list) or not isinstance(values, list) or len(edges) != len(values):
        raise ConfigError(
            f"run {run.name}, step {record['step']}: {key} does not fit {POSITION_EDGES_KEY}; repair or remove the line"
        )
    # A count of 0 has no place on a logarithmic axis; any other 0 is a measurement.
    is_count = key.endswith("/count")
    pairs = zip(edges, values, strict=True)
    return [(float(edge), float(value)) for edge, value in pairs if value is not None and (value or not is_count)]


def draw_timing(runs: Sequence[Run], title: str, path: Path) -> bool:
    """Mean seconds per phase as stacked bars, and tokens per second over steps; False when no run has times."""
    phases = list(dict.fromkeys(key for run in runs for key in run.keys("timing") if _is_phase(key)))
    if not phases:
        path.unlink(missing_ok=True)
        return False
    figure, (bars, speed) = _grid(2, title, room_below=0.5)
    left = np.zeros(len(runs))
    rows = list(range(len(runs)))
    for number, phase in enumerate(phases):
        found = [run.series(phase) for run in runs]
        widths = np.array([np.mean(series.values) if series else 0.0 for series in found])
        look: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "hatch": HATCHES[number % len(HATCHES)]}
        bars.barh(rows, widths, left=left, height=0.5, edgecolor="white", label=_phase_name(phase), **look)
        left += widths
    bars.set_yticks([])
    for row, run in enumerate(runs):
        # Above its bar rather than beside it, since a name may be longer than any margin.
        bars.text(0, row - 0.28, run.name, fontsize=8, va="bottom", parse_math=False)
    bars.set_ylim(len(runs) - 0.6, -0.75)
    _dress(bars, "Phases of a step", "mean seconds per step", "")
    bars.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    for index, run in enumerate(runs):
        series = run.series("timing/tokens_per_second")
        if series is not None:
            speed.plot(series.steps, series.values, **_look(index, len(series.steps)))
    _dress_steps(speed, "Speed", "response tokens per second")
    _finish(figure, runs, path)
    return True


def _is_phase(key: str) -> bool:
    return not key.endswith("_per_second") and _phase_name(key) != "step"


def _phase_name(key: str) -> str:
    return key.removeprefix("timing/").removesuffix("_s").replace("_", " ")


def _grid(num_panels: int, title: str, *, room_below: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Panels in two columns with fixed margins; measuring every text for a tight layout takes longer than drawing."""
    num_columns = min(2, num_panels)
    num_rows = -(-num_panels // num_columns)
    panel_width, panel_height = _PANEL_INCHES
    width = _LEFT + num_columns * panel_width + (num_columns - 1) * _BETWEEN_COLUMNS + _RIGHT
    below = _BELOW + room_below
    height = _ABOVE + num_rows * panel_height + (num_rows - 1) * _BETWEEN_ROWS + below
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH)
    figure.suptitle(title, fontsize=13, fontweight="bold", y=1 - 0.15 / height, va="top")
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    figure.subplots_adjust(
        left=_LEFT / width,
        right=1 - _RIGHT / width,
        top=1 - _ABOVE / height,
        bottom=below / height,
        wspace=_BETWEEN_COLUMNS / panel_width,
        hspace=_BETWEEN_ROWS / panel_height,
    )
    for ax in grid[num_panels:]:
        ax.remove()
    return figure, list(grid[:num_panels])


def _look(index: int, num_points: int) -> dict[str, Any]:
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markevery": max(1, num_points // _NUM_MARKERS),
        "markersize": 4,
        "linewidth": 1.5,
    }


def _dress(ax: Axes, title: str, x_label: str, y_label: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x_label, fontsize=9)
    ax.set_ylabel(y_label, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _dress_steps(ax: Axes, title: str, y_label: str) -> None:
    _dress(ax, title, "optimizer step", y_label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _name_missing(ax: Axes, names: Sequence[str]) -> None:
    if names:
        text = f"not measured: {', '.join(names)}"
        ax.text(0.01, 0.02, text, transform=ax.transAxes, fontsize=7, color="#666666", parse_math=False)


def _style_legend(ax: Axes, labels: Sequence[str], styles: Sequence[Any] = LINE_STYLES) -> None:
    handles = [
        Line2D([], [], color="#444444", linestyle=style, label=label)
        for label, style in zip(labels, styles, strict=False)
    ]
    ax.legend(handles=handles, fontsize=7, frameon=False, loc="best")


def _finish(figure: Figure, runs: Sequence[Run], path: Path) -> None:
    """Adds the runs' legend and saves; the same data gives the same bytes."""
    # A label that begins with an underscore would be left out of the legend.
    labels = [f" {run.name}" if run.name.startswith("_") else run.name for run in runs]
    handles = [Line2D([], [], label=label, **_look(index, 1)) for index, label in enumerate(labels)]
    legend = figure.legend(handles=handles, loc="lower center", ncols=min(4, len(runs)), fontsize=9, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, format="png", metadata={"Software": None})
