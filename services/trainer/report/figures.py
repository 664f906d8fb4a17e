"""What the report shows: the panels of the paper's figures, as data, and the order they come in.

A panel that no run has data for is left out, and so is a figure without panels; a run that lacks a panel's metric is
named in the panel, so that a missing line is never mistaken for a flat one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.trainer.report import drawing
from services.trainer.report.drawing import Line, Panel
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
        caption="Fig 6: in runs that work, overlap rises, the advantage nears 0 and the entropy gap narrows.",
        panels=(
            _panel("Accuracy of training rollouts", "fraction correct", ("outcome/accuracy", "")),
            _panel("Overlap ratio (eq 6)", "shared ids / k", ("distill/overlap_ratio", "")),
            _panel("Overlap-token advantage (eq 7)", "nats per overlap token", ("distill/overlap_advantage", "")),
            _panel("Entropy gap (eq 8)", "nats", ("distill/entropy_gap", "")),
        ),
    ),
    Figure(
        name="mass_and_entropy",
        title="Overlap mass and entropies",
        caption="B.1: each model's probability on the shared ids. Entropies are over the whole vocabulary.",
        panels=(
            _panel(
                "Mass on the overlap (eq 9, 10)",
                "probability",
                ("distill/overlap_mass_student", "student"),
                ("distill/overlap_mass_teacher", "teacher"),
            ),
            _panel(
                "Entropy",
                "nats",
                ("distill/entropy_student", "student"),
                ("distill/entropy_teacher", "teacher"),
            ),
            _panel("Overlap of the 99 % id sets", "Jaccard index", ("distill/mass99_overlap", "")),
            _panel("Positions without an overlap", "fraction", ("distill/empty_overlap_fraction", "")),
        ),
    ),
    Figure(
        name="optimization",
        title="Optimization",
        caption="B.2: a small loss alone is no success; in the paper the failing run starts with the smaller one.",
        panels=(
            _panel("Loss of the objective", "nats per position", ("loss/objective", "")),
            _panel("Reverse KL, student to teacher", "nats per position", ("loss/reverse_kl", "")),
            _panel("Gradient norm before clipping", "L2 norm", ("optim/grad_norm", "")),
            _panel(
                "Student minus teacher, most extreme token",
                "probability",
                ("distill/extreme_prob_gap", "signed"),
                ("distill/extreme_prob_gap_abs", "absolute"),
            ),
        ),
    ),
    Figure(
        name="rollouts",
        title="Rollouts and the teacher's reward",
        caption="6.2: the reward may tell right from wrong (AUROC above 0.5) and the run may still fail.",
        panels=(
            _panel("Response length", "tokens", ("rollout/response_length", "")),
            _panel("Responses cut off at the limit", "fraction", ("rollout/truncated_fraction", "")),
            _panel("Mean teacher reward of a rollout", "nats per position", ("rollout/teacher_reward", "")),
            _panel("Teacher reward, correct against incorrect", "AUROC", ("outcome/auroc", "")),
        ),
    ),
)

BY_POSITION = (
    ("distill/overlap_ratio", "Overlap ratio", "shared ids / k"),
    ("distill/overlap_advantage", "Overlap-token advantage", "nats per overlap token"),
    ("distill/entropy_student", "Student entropy", "nats"),
    ("distill/entropy_teacher", "Teacher entropy", "nats"),
    ("distill/entropy_gap", "Entropy gap", "nats"),
)


def draw_figures(runs: Sequence[Run], folder: Path) -> list[DrawnFigure]:
    """Draws everything the runs have data for into `folder`, over what an earlier report left there."""
    drawn = []
    for figure in FIGURES:
        path = folder / f"{figure.name}.png"
        if drawing.draw_over_steps(runs, figure.panels, figure.title, path):
            drawn.append(DrawnFigure(path=path, title=figure.title, caption=figure.caption))
    positions = DrawnFigure(
        path=folder / "by_position.png",
        title="By position in the response",
        caption="Figs 13, 23: the first step dotted, the last step solid; collapse begins at late positions.",
    )
    if drawing.draw_by_position(runs, BY_POSITION, positions.title, positions.path):
        drawn.append(positions)
    timing = DrawnFigure(
        path=folder / "timing.png",
        title="Where the time goes",
        caption="Mean seconds of each phase of a step, and response tokens trained per second.",
    )
    if drawing.draw_timing(runs, timing.title, timing.path):
        drawn.append(timing)
    return drawn
