"""What the report shows: the panels of the paper's figures, as data, and the order they come in.

A panel that no run has data for is left out, and so is a figure without panels; a run that lacks a panel's metric is
named in the panel, so that a missing line is never mistaken for a flat one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.trainer.report.drawing import FRACTION, Line, Panel, draw_over_steps, draw_timing
from services.trainer.report.positions import PositionMetric, draw_by_position, draw_heat_maps
from services.trainer.report.rewards import draw_rewards
from services.trainer.report.runs import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """Panels over training steps under one title."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnFigure:
    """A PNG file and what to say of it."""

    path: Path
    title: str
    caption: str


def _panel(title: str, y_label: str, *lines: tuple[str, str]) -> Panel:
    return Panel(title=title, y_label=y_label, lines=tuple(Line(key=key, label=label) for key, label in lines))


FIGURES = (
    Figure(
        name="dynamics",
        title="Training dynamics",
        caption="Figs 2 and 6: in runs that work, overlap rises, the advantage nears 0 and the entropy gap narrows.",
        panels=(
            _panel("Accuracy of training rollouts", "fraction correct", ("outcome/accuracy", "")),
            _panel("Overlap ratio (eq 6)", "shared ids / k", ("distill/overlap_ratio", "")),
            _panel("Overlap-token advantage (eq 7)", "nats per overlap token", ("distill/overlap_advantage", "")),
            _panel("Entropy gap (eq 8)", "nats", ("distill/entropy_gap", "")),
            _panel(
                "Mass on the overlap (eq 9, 10)",
                "probability",
                ("distill/overlap_mass_student", "student"),
                ("distill/overlap_mass_teacher", "teacher"),
            ),
            _panel("Reverse KL, student to teacher (eq 5)", "nats per position", ("loss/reverse_kl", "")),
        ),
    ),
    Figure(
        name="sets_and_entropy",
        title="Shared ids and entropies",
        caption="Fig 10 and C.2: a small overlap may hold most of the mass, and a large one may miss it.",
        panels=(
            _panel(
                "Entropy",
                "nats",
                ("distill/entropy_student", "student"),
                ("distill/entropy_teacher", "teacher"),
            ),
            _panel("Overlap of the 99 % id sets", "Jaccard index", ("distill/mass99_overlap", "")),
            _panel("Positions without an overlap", FRACTION, ("distill/empty_overlap_fraction", "")),
            _panel("Positions with a uniform teacher", FRACTION, ("distill/uniform_teacher_fraction", "")),
        ),
    ),
    Figure(
        name="optimization",
        title="Optimization",
        caption="B.2 and 6.2: a small loss alone is no success; in the paper the failing run starts with the smaller "
        "one. Coherence is 1 when all rollouts of the probe pull one way, 1 / sqrt(n) when they are orthogonal.",
        panels=(
            _panel("Loss of the objective", "nats per position", ("loss/objective", "")),
            _panel("Gradient norm before clipping", "L2 norm", ("optim/grad_norm", "")),
            _panel("Gradient coherence on the probe", "norm of mean / mean norm", ("distill/gradient_coherence", "")),
            _panel(
                "Student minus teacher, most extreme token",
                "probability",
                ("distill/extreme_prob_gap", "signed"),
                ("distill/extreme_prob_gap_abs", "absolute"),
            ),
            _panel("Supports of fewer than two ids", FRACTION, ("loss/small_support_fraction", "")),
        ),
    ),
    Figure(
        name="rollouts",
        title="Rollouts and the teacher's reward",
        caption="Fig 14 and 6.2: the reward may tell right from wrong (AUROC above 0.5) and the run may still fail.",
        panels=(
            _panel("Response length", "tokens", ("rollout/response_length", "")),
            _panel("Responses cut off at the limit", FRACTION, ("rollout/truncated_fraction", "")),
            _panel(
                "Mean teacher reward of a rollout",
                "nats per position",
                ("outcome/teacher_reward_correct", "correct"),
                ("outcome/teacher_reward_incorrect", "incorrect"),
                ("rollout/teacher_reward", "all"),
            ),
            _panel("Teacher reward, correct against incorrect", "AUROC", ("outcome/auroc", "")),
            _panel(
                "Log-prob of the sampled EOS",
                "nats",
                ("rollout/eos_logprob_student", "student"),
                ("rollout/eos_logprob_teacher", "teacher"),
            ),
        ),
    ),
)

BY_POSITION = (
    PositionMetric(key="distill/overlap_ratio", title="Overlap ratio", unit="shared ids / k"),
    PositionMetric(key="distill/overlap_advantage", title="Overlap-token advantage", unit="nats per overlap token"),
    PositionMetric(key="distill/entropy_student", title="Student entropy", unit="nats"),
    PositionMetric(key="distill/entropy_teacher", title="Teacher entropy", unit="nats"),
    PositionMetric(key="distill/entropy_gap", title="Entropy gap", unit="nats"),
)
HEAT_MAPS = (BY_POSITION[2], BY_POSITION[3], BY_POSITION[0])


def draw_figures(runs: Sequence[Run], folder: Path) -> list[DrawnFigure]:
    """Draws everything the runs have data for into `folder`, over what an earlier report left there."""
    drawn = []
    for figure in (_evaluations(runs), *FIGURES):
        path = folder / f"{figure.name}.png"
        if draw_over_steps(runs, figure.panels, figure.title, path):
            drawn.append(DrawnFigure(path=path, title=figure.title, caption=figure.caption))
    return drawn + _rewards(runs, folder) + _by_position(runs, folder) + _timing(runs, folder)


def _evaluations(runs: Sequence[Run]) -> Figure:
    """A panel for each problem set that any run was evaluated on."""
    names = sorted({name for run in runs for name in run.evaluations})
    return Figure(
        name="evaluations",
        title="Evaluations",
        caption="Figs 2 and 6, top: accuracy on problems that were not trained on, before, during and after training.",
        panels=tuple(_panel(name.removeprefix("evaluation/accuracy/"), "avg@n", (name, "")) for name in names),
    )


def _rewards(runs: Sequence[Run], folder: Path) -> list[DrawnFigure]:
    rewards = DrawnFigure(
        path=folder / "rewards.png",
        title="Teacher rewards by outcome",
        caption="Fig 14: mean log q - log p of each rollout, all steps together. Two separate hills say that the "
        "reward knows right from wrong, not that it can be learned from.",
    )
    return [rewards] if draw_rewards(runs, rewards.title, rewards.path) else []


def _by_position(runs: Sequence[Run], folder: Path) -> list[DrawnFigure]:
    curves = DrawnFigure(
        path=folder / "by_position.png",
        title="By position in the response",
        caption="The first step dotted, the last step solid.",
    )
    maps = DrawnFigure(
        path=folder / "heat_maps.png",
        title="By position and step",
        caption="Figs 13 and 23: in a run that collapses, entropy rises at late positions first and moves forward.",
    )
    drawn = [curves] if draw_by_position(runs, BY_POSITION, curves.title, curves.path) else []
    return [*drawn, maps] if draw_heat_maps(runs, HEAT_MAPS, maps.title, maps.path) else drawn


def _timing(runs: Sequence[Run], folder: Path) -> list[DrawnFigure]:
    timing = DrawnFigure(
        path=folder / "timing.png",
        title="Where the time goes",
        caption="Mean seconds of each phase of a step, and response tokens trained per second. Metrics come after the "
        "step and are not part of its time.",
    )
    return [timing] if draw_timing(runs, timing.title, timing.path) else []
