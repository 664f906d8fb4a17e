"""The figures of the continuation and the reward study, after the paper's Figs 11(b) and 14; legible without colour."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd.errors import ConfigError
from services.trainer.evaluation.continuation import ContinuationResult
from services.trainer.evaluation.reward import RewardResult
from services.trainer.report.layout import COLORS

_NUM_BINS = 30
_SHOWN_QUANTILES = (0.01, 0.99)
_REWARD_LABEL = "mean reward of a rollout (nats per token; ends: outermost 1 %)"
_DOTS_PER_INCH = 120
_PANEL_INCHES = (4.6, 3.2)


def draw_continuation(result: ContinuationResult, path: Path) -> None:
    """Gain over the student's own response by depth of the prefix, with intervals."""
    figure = Figure(figsize=_PANEL_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    ax = figure.subplots()
    places = np.arange(len(result.depths))
    gains = [one.gain for one in result.depths]
    values = np.array([gain.value for gain in gains])
    errors = np.array([[gain.value - gain.low, gain.high - gain.value] for gain in gains]).T
    ax.axhline(0, color="#444444", linewidth=0.8)
    # Rounding may put a bound a hair on the wrong side of the value it bounds.
    ax.errorbar(places, values, yerr=errors.clip(min=0), color=COLORS[0], marker="o", capsize=3, linewidth=1.5)
    for place, value in zip(places, values, strict=True):
        ax.annotate(f"{value:+.2f}", (place, value), textcoords="offset points", xytext=(8, 4), fontsize=8)
    ax.set_xticks(places, [str(one.depth) for one in result.depths])
    ax.margins(x=0.12)
    title = f"{result.teacher} continues {result.student} on {result.data}"
    subtitle = f"{result.num_selected} rollouts, {result.num_selected_problems} problems, 95 % over problems"
    _dress(ax, f"{title}\n{subtitle}", "student prefix (tokens)", "accuracy gain")
    _save(figure, path)


def draw_rewards(results: Sequence[RewardResult], is_correct: Sequence[bool], student: str, path: Path) -> None:
    """One panel a teacher: the distribution of r-bar over right and over wrong rollouts."""
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(results), height), dpi=_DOTS_PER_INCH, layout="constrained")
    correct_R = np.asarray(is_correct, np.bool_)
    for ax, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        rewards_R = np.array(result.rewards)
        # A few extreme rollouts would squeeze all others into one bar; they are counted in the outermost bars.
        rewards_R = rewards_R.clip(*np.quantile(rewards_R, _SHOWN_QUANTILES))
        edges = np.histogram_bin_edges(rewards_R, bins=_NUM_BINS)
        kinds = (("right", correct_R, COLORS[0], ""), ("wrong", ~correct_R, COLORS[1], "///"))
        for name, chosen_R, color, hatch in kinds:
            if chosen_R.any():
                label = f"{name} ({int(chosen_R.sum())})"
                weights = np.full(int(chosen_R.sum()), 1 / chosen_R.sum())
                ax.hist(
                    rewards_R[chosen_R], bins=edges, weights=weights, histtype="stepfilled", alpha=0.45, color=color,
                    edgecolor=color, hatch=hatch, label=label,
                )  # fmt: skip
        found = "AUROC absent: one class is empty"
        if result.auroc is not None:
            found = f"AUROC {result.auroc.value:.2f} ({result.auroc.low:.2f}-{result.auroc.high:.2f})"
        _dress(ax, f"{result.teacher} on {student}\n{found}", _REWARD_LABEL, "share")
        ax.legend(fontsize=8, frameon=False)
    _save(figure, path)


def _dress(ax: Axes, title: str, x_label: str, y_label: str) -> None:
    ax.set_title(title, fontsize=9, parse_math=False)
    ax.set_xlabel(x_label, fontsize=9)
    ax.set_ylabel(y_label, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(True, axis="y", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    """The same data gives the same bytes; `ConfigError` where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise ConfigError(f"figure {path}: {error.strerror}; give a file that can be written") from error
