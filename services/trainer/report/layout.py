"""How every figure looks: grid, margins, colours, legends. One colour and marker per run, legible without colour.

Colours are those of Okabe and Ito, told apart by colour-blind readers too. No pyplot: figures are objects of their own
and leave no state behind.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from services.trainer.report.runs import Run

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
TEXT, FAINT, GRID = "#222222", "#666666", "#E3E3E3"
POSITION_LABEL = "position in the response (start of bucket, tokens)"
_PANEL_INCHES = (4.4, 2.4)
_LEFT, _RIGHT, _ABOVE, _BELOW, _BETWEEN_COLUMNS, _BETWEEN_ROWS = 0.85, 0.2, 0.75, 0.95, 0.95, 0.95
"""Inches around and between panels: room for tick labels, axis labels, titles and the legend of the runs."""
_DOTS_PER_INCH = 100
_NUM_MARKERS = 12
_LINE_INCHES = 0.16


def grid(
    num_panels: int, title: str, *, num_columns: int = 2, room_below: float = 0.0, room_right: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """Panels in columns with fixed margins; measuring every text for a tight layout takes longer than drawing."""
    num_columns = min(num_columns, num_panels)
    num_rows = -(-num_panels // num_columns)
    panel_width, panel_height = _PANEL_INCHES
    right = _RIGHT + room_right
    width = _LEFT + num_columns * panel_width + (num_columns - 1) * _BETWEEN_COLUMNS + right
    below = _BELOW + room_below
    height = _ABOVE + num_rows * panel_height + (num_rows - 1) * _BETWEEN_ROWS + below
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH)
    figure.suptitle(title, fontsize=13, fontweight="bold", y=1 - 0.15 / height, va="top", color=TEXT)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    figure.subplots_adjust(
        left=_LEFT / width,
        right=1 - right / width,
        top=1 - _ABOVE / height,
        bottom=below / height,
        wspace=_BETWEEN_COLUMNS / panel_width,
        hspace=_BETWEEN_ROWS / panel_height,
    )
    for ax in axes[num_panels:]:
        ax.remove()
    return figure, list(axes[:num_panels])


def look(index: int, num_points: int) -> dict[str, Any]:
    """Colour, marker and line of the run at this index."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markevery": max(1, num_points // _NUM_MARKERS),
        "markersize": 4,
        "linewidth": 1.5,
    }


def dress(ax: Axes, title: str, x_label: str, y_label: str) -> None:
    ax.set_title(title, fontsize=10, color=TEXT, parse_math=False)
    ax.set_xlabel(x_label, fontsize=9, color=TEXT)
    ax.set_ylabel(y_label, fontsize=9, color=TEXT)
    ax.tick_params(labelsize=8, color=FAINT)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)


def dress_steps(ax: Axes, title: str, y_label: str) -> None:
    dress(ax, title, "optimizer step", y_label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def name_missing(ax: Axes, names: Sequence[str]) -> None:
    if names:
        text = f"not measured: {', '.join(names)}"
        ax.text(0.01, 0.02, text, transform=ax.transAxes, fontsize=7, color=FAINT, parse_math=False)


def style_legend(ax: Axes, labels: Sequence[str], styles: Sequence[Any] = LINE_STYLES) -> None:
    handles = [
        Line2D([], [], color="#444444", linestyle=style, label=label)
        for label, style in zip(labels, styles, strict=False)
    ]
    ax.legend(handles=handles, fontsize=7, frameon=False, loc="best")


def lines_room(num_lines: int) -> float:
    """Inches that `finish` needs below the panels for this many lines."""
    return num_lines * _LINE_INCHES + (0.1 if num_lines else 0.0)


def finish(figure: Figure, runs: Sequence[Run], path: Path, *, lines: Sequence[str] = ()) -> None:
    """Adds `lines` and the runs' legend and saves; the same data gives the same bytes."""
    height = float(figure.get_figheight())
    for number, line in enumerate(reversed(lines)):
        y = (0.45 + number * _LINE_INCHES) / height
        figure.text(0.015, y, line, fontsize=7.5, color=FAINT, va="bottom", parse_math=False)
    # A label that begins with an underscore would be left out of the legend.
    labels = [f" {run.name}" if run.name.startswith("_") else run.name for run in runs]
    handles = [Line2D([], [], label=label, **look(index, 1)) for index, label in enumerate(labels)]
    legend = figure.legend(handles=handles, loc="lower center", ncols=min(4, len(runs)), fontsize=9, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, format="png", metadata={"Software": None})
