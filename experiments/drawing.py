"""Puts an experiment's panels on paper: one colour and line style per arm, seeds said in the legend.

No pyplot: a figure is an object of its own and leaves no state behind. The same findings give the same bytes.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from experiments.findings import ArmFindings, Findings, Run
from experiments.panels import Accuracies, ByLevel, ByPosition, Curve, Custom, Panel
from opd.files import whole_file
from services.trainer.report.layout import COLORS, LINE_STYLES, MARKERS

_PANEL_INCHES = (5.2, 3.1)
_LEGEND_ROW_INCHES = 0.24
_DOTS_PER_INCH = 90
_NUM_COLUMNS = 2
_NUM_COLORS = 96
_MAX_ARMS_WITH_BANDS = 4


def draw(findings: Findings, panels: Sequence[Panel], title: str, path: Path) -> None:
    """Writes the figure of an experiment as PNG."""
    num_rows = -(-len(panels) // _NUM_COLUMNS)
    legend_inches = _LEGEND_ROW_INCHES * -(-len(findings.arms) // _NUM_COLUMNS) + 0.1
    width, height = _NUM_COLUMNS * _PANEL_INCHES[0], num_rows * _PANEL_INCHES[1] + legend_inches + 0.4
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")
    figure.get_layout_engine().set(rect=(0, legend_inches / height, 1, 1 - legend_inches / height))  # type: ignore
    figure.suptitle(title, fontsize=12, fontweight="bold")
    axes = figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False).ravel()
    for ax, panel in zip(axes, panels, strict=False):
        _draw_panel(ax, panel, findings)
    for ax in axes[len(panels) :]:
        ax.remove()
    handles = [Line2D([], [], label=legend_of(label, arm), **_look(i)) for i, (label, arm) in _numbered(findings)]
    figure.legend(handles=handles, loc="lower center", ncols=_NUM_COLUMNS, fontsize=9, frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """With a palette of few colours, which takes a third of the bytes and shows the same lines."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, Image.open(drawn) as image:
        image.convert("RGB").quantize(_NUM_COLORS).save(partial, format="png", optimize=True)


def legend_of(label: str, arm: ArmFindings) -> str:
    """The arm with its number of seeds."""
    return f"{label} ({len(arm.runs)} seed{'s' if len(arm.runs) > 1 else ''})"


def _draw_panel(ax: Axes, panel: Panel, findings: Findings) -> None:
    if isinstance(panel, Curve):
        for index, (_, arm) in _numbered(findings):
            _draw_curve(ax, arm, panel.metric, index, has_band=len(findings.arms) <= _MAX_ARMS_WITH_BANDS)
        _dress(ax, panel.title, "optimizer step", panel.y_label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif isinstance(panel, ByPosition):
        _draw_by_position(ax, findings, panel.metric)
        _dress(
            ax,
            f"{panel.title}: first steps dotted, last solid",
            "position in the response, start of bucket",
            panel.y_label,
        )
    elif isinstance(panel, Accuracies):
        _draw_accuracies(ax, findings)
        _dress(ax, panel.title, "", "fraction correct")
    elif isinstance(panel, ByLevel):
        for index, (_, arm) in _numbered(findings):
            levels = sorted(arm.runs[0].accuracy_by_level)
            means = [float(np.mean([run.accuracy_by_level[level] for run in arm.runs])) for level in levels]
            ax.plot(levels, means, **_look(index))
        _dress(ax, panel.title, "level", "fraction correct")
    elif isinstance(panel, Custom):
        panel.draw(ax, findings)
        _dress(ax, panel.title, panel.x_label, panel.y_label)


def _draw_curve(ax: Axes, arm: ArmFindings, metric: str, index: int, *, has_band: bool) -> None:
    rows = [_filled(run, metric) for run in arm.runs if metric in run.series]
    if not rows:
        return
    # Arms may have come to different lengths only when a definition was changed in between; the shortest counts.
    length = min(len(row) for row in rows)
    values_SN, steps = np.array([row[:length] for row in rows]), arm.runs[0].steps[:length]
    look = _look(index)
    ax.plot(steps, values_SN.mean(axis=0), **look, markevery=max(1, length // 8))
    if has_band and len(rows) > 1:
        ax.fill_between(steps, values_SN.min(axis=0), values_SN.max(axis=0), color=look["color"], alpha=0.15, lw=0)


def _filled(run: Run, metric: str) -> list[float]:
    return [np.nan if value is None else value for value in run.series[metric]]


def _draw_by_position(ax: Axes, findings: Findings, metric: str) -> None:
    """Of each arm's first seed: buckets of several seeds would be the same curve three times."""
    edges: list[float] = []
    for index, (_, arm) in _numbered(findings):
        run = arm.runs[0]
        for window, style in (("first", ":"), ("last", "-")):
            buckets = zip(*run.by_position.get(metric, {}).get(window, []), strict=True)
            known = [[value for value in bucket if value is not None] for bucket in buckets]
            means = [float(np.mean(values)) for values in known if values]
            ax.plot(range(len(means)), means, **{**_look(index), "linestyle": style})
            edges = max(edges, run.position_edges[: len(means)], key=len)
    ax.set_xticks(range(len(edges)), [f"{edge:g}" for edge in edges])


def _draw_accuracies(ax: Axes, findings: Findings) -> None:
    for index, (_, arm) in _numbered(findings):
        found, look = arm.accuracy(), _look(index)
        errors = [[found.value - found.low], [found.high - found.value]]
        ax.bar(index, found.value, color=look["color"], alpha=0.75, width=0.7)
        ax.errorbar(index, found.value, yerr=errors, color="black", capsize=3, linewidth=1)
        for by_problem, style in ((arm.before_by_problem, ":"), (arm.teacher_by_problem, "--")):
            if by_problem is None:
                continue
            ax.hlines(
                float(np.mean(by_problem)), index - 0.45, index + 0.45, color="black", linestyle=style, linewidth=1.2
            )
    ax.set_xticks(range(len(findings.arms)), list(findings.arms), rotation=20, ha="right", fontsize=8)
    handles = [Line2D([], [], color="black", linestyle=":", label="student before")]
    if any(arm.teacher_by_problem is not None for arm in findings.arms.values()):
        handles.append(Line2D([], [], color="black", linestyle="--", label="teacher"))
    ax.legend(handles=handles, fontsize=7, loc="lower right")


def _numbered(findings: Findings) -> list[tuple[int, tuple[str, ArmFindings]]]:
    return list(enumerate(findings.arms.items()))


def _look(index: int) -> dict[str, Any]:
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)],
        "markersize": 4,
        "linewidth": 1.4,
    }


def _dress(ax: Axes, title: str, x_label: str, y_label: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x_label, fontsize=9)
    ax.set_ylabel(y_label, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
