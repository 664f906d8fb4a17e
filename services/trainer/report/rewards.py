"""The teacher's mean reward of each rollout, correct ones against incorrect ones (Fig 14)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from services.trainer.diagnostics.outcomes import auroc
from services.trainer.diagnostics.step import CORRECT_REWARDS, INCORRECT_REWARDS
from services.trainer.report.layout import COLORS, dress, finish, grid
from services.trainer.report.runs import Run

_NUM_BINS = 40
_SHOWN_PERCENTILES = (2.0, 99.5)
_CLASSES = ((CORRECT_REWARDS, "correct", COLORS[2]), (INCORRECT_REWARDS, "incorrect", COLORS[1]))


def draw_rewards(runs: Sequence[Run], title: str, path: Path) -> bool:
    """One panel per run that graded its rollouts, all on one scale; False, and no file, when none did."""
    graded = [(run, {key: _all(run, key) for key, _, _ in _CLASSES}) for run in runs]
    graded = [(run, rewards) for run, rewards in graded if any(values.size for values in rewards.values())]
    if not graded:
        path.unlink(missing_ok=True)
        return False
    everything = np.concatenate([values for _, rewards in graded for values in rewards.values()])
    low, high = np.percentile(everything, _SHOWN_PERCENTILES)
    # A single value would make a scale without a width.
    bins = np.linspace(low, max(high, low + 1e-6), _NUM_BINS + 1)
    figure, axes = grid(len(graded), title)
    for (run, rewards), ax in zip(graded, axes, strict=True):
        _draw_classes(ax, rewards, bins)
        dress(ax, f"{run.name}{_auroc(rewards)}", "mean log q - log p of a rollout, nats", "density")
    finish(figure, [], path)
    return True


def _all(run: Run, key: str) -> NDArray[np.float64]:
    return np.array([reward for record in run.arrays(key) for reward in record[key]], dtype=np.float64)


def _draw_classes(ax: Axes, rewards: dict[str, NDArray[np.float64]], bins: NDArray[np.float64]) -> None:
    for key, name, color in _CLASSES:
        values = rewards[key]
        if values.size:
            # What lies beyond the scale stays in the outermost bins, so that the hills keep their weight.
            inside = np.clip(values, bins[0], bins[-1])
            label = f"{name}, {values.size} rollouts, mean {values.mean():.3g}"
            ax.hist(inside, bins=bins.tolist(), density=True, color=color, alpha=0.35, label=label)
            ax.hist(inside, bins=bins.tolist(), density=True, color=color, histtype="step", linewidth=1.2)
            ax.axvline(float(values.mean()), color=color, linewidth=1.0, linestyle="--")
    ax.legend(fontsize=7, frameon=False, loc="upper left")


def _auroc(rewards: dict[str, NDArray[np.float64]]) -> str:
    correct, incorrect = (rewards[key].tolist() for key, _, _ in _CLASSES)
    area = auroc([*correct, *incorrect], [True] * len(correct) + [False] * len(incorrect))
    return "" if area is None else f", AUROC {area:.3f}"
