"""Metrics by position in the response: first and last step as curves, and every step as a heat map (Figs 13, 23)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from opd.errors import ConfigError
from services.trainer.diagnostics.step import POSITION_EDGES_KEY
from services.trainer.report.layout import POSITION_LABEL, dress, finish, grid, look, name_missing, style_legend
from services.trainer.report.runs import Record, Run

_MAX_COLUMNS = 3
_COLORS = "viridis"
_SCALE_PERCENTILES = (2, 98)
_NOTHING = "#F2F2F2"
"""Where no position fell into a bucket."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionMetric:
    """A metric with buckets, as it is called on paper."""

    key: str
    title: str
    unit: str

    @property
    def array(self) -> str:
        return f"{self.key}/by_position"


def draw_by_position(runs: Sequence[Run], metrics: Sequence[PositionMetric], title: str, path: Path) -> bool:
    """One panel per metric by position bucket, and one with the number of positions; False when nothing is known."""
    shown = [metric for metric in metrics if any(run.arrays(metric.array) for run in runs)]
    if not shown:
        path.unlink(missing_ok=True)
        return False
    figure, axes = grid(len(shown) + 1, title)
    for metric, ax in zip(shown, axes[:-1], strict=True):
        missing = _draw_buckets(ax, runs, metric.array)
        dress(ax, metric.title, POSITION_LABEL, metric.unit)
        name_missing(ax, missing)
        style_legend(ax, ["last step", "first step"], ("-", ":"))
    _draw_buckets(axes[-1], runs, f"{shown[0].array}/count")
    axes[-1].set_ylim(bottom=0)
    dress(axes[-1], f"Positions behind {shown[0].title.lower()}", POSITION_LABEL, "count")
    finish(figure, runs, path)
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
        ax.plot(places, [value for _, value in known], linestyle=style, **look(index, len(known)))
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
    # A count of 0 stands for a bucket without a value; any other 0 is a measurement.
    is_count = key.endswith("/count")
    pairs = zip(edges, values, strict=True)
    return [(float(edge), float(value)) for edge, value in pairs if value is not None and (value or not is_count)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Map:
    """B buckets of positions by N steps; NaN where nothing was measured."""

    name: str
    steps: list[int]
    edges: list[float]
    values_BN: NDArray[np.float64]


def draw_heat_maps(runs: Sequence[Run], metrics: Sequence[PositionMetric], title: str, path: Path) -> bool:
    """One map per metric and run, steps across and positions upwards, one scale per metric; False without any."""
    rows = [(metric, _maps(runs, metric)) for metric in metrics]
    rows = [(metric, maps) for metric, maps in rows if maps]
    if not rows:
        path.unlink(missing_ok=True)
        return False
    num_columns = min(_MAX_COLUMNS, max(len(maps) for _, maps in rows))
    # A metric begins a row of its own, whatever the one before it left empty.
    places = [_padded(metric, maps, num_columns) for metric, maps in rows]
    cells = [cell for row in places for cell in row]
    figure, axes = grid(len(cells), title, num_columns=num_columns, room_right=0.45)
    for cell, ax in zip(cells, axes, strict=True):
        if cell is None:
            ax.remove()
        else:
            _draw_map(ax, *cell)
    finish(figure, [], path)
    return True


_Cell = tuple[PositionMetric, _Map, tuple[float, float]]


def _padded(metric: PositionMetric, maps: Sequence[_Map], num_columns: int) -> list[_Cell | None]:
    # A bucket that few positions fell into is far off by chance, and would take the colours of all others.
    low, high = np.nanpercentile(np.concatenate([found.values_BN.ravel() for found in maps]), _SCALE_PERCENTILES)
    cells: list[_Cell | None] = [(metric, found, (float(low), float(high))) for found in maps]
    return cells + [None] * (-len(cells) % num_columns)


def _maps(runs: Sequence[Run], metric: PositionMetric) -> list[_Map]:
    """Of the runs with at least two steps, since one is a curve."""
    found = []
    for run in runs:
        records = run.arrays(metric.array)
        columns = [dict(_known_buckets(run, record, metric.array)) for record in records]
        edges = sorted({edge for column in columns for edge in column})
        if len(columns) < 2 or not edges:
            continue
        values_BN = np.array([[column.get(edge, math.nan) for column in columns] for edge in edges])
        steps = [record["step"] for record in records]
        found.append(_Map(name=run.name, steps=steps, edges=edges, values_BN=values_BN))
    return found


def _draw_map(ax: Axes, metric: PositionMetric, found: _Map, scale: tuple[float, float]) -> None:
    steps = np.array(found.steps, dtype=float)
    # Each step reaches halfway to its neighbours, so that steps that were left out leave no hole.
    middles = (steps[1:] + steps[:-1]) / 2
    bounds = np.concatenate([[steps[0] - 0.5], middles, [steps[-1] + 0.5]])
    rows = np.arange(len(found.edges) + 1) - 0.5
    low, high = scale
    mesh = ax.pcolormesh(bounds, rows, found.values_BN, cmap=_COLORS, vmin=low, vmax=high)
    dress(ax, f"{metric.title}, {found.name}", "optimizer step", "position from")
    ax.grid(False)
    ax.set_facecolor(_NOTHING)
    ax.set_yticks(range(len(found.edges)), [f"{edge:g}" for edge in found.edges])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02, fraction=0.05, extend="both")
    bar.set_label(metric.unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
