"""Figs 6, 18, 19 and 20: a run that works beside one that does not, for two students."""

from collections.abc import Sequence

from experiments.cast import BIG_FAILURE, BIG_SUCCESS, FAILURE, SUCCESS
from experiments.claims import Check, Claim
from experiments.estimates import mean_of
from experiments.experiment import Experiment
from experiments.findings import SMOOTHED_STEPS, ArmFindings, Findings, Window
from experiments.panels import (
    ADVANTAGE,
    ENTROPY_GAP,
    EXTREME_GAP,
    GRADIENT_NORM,
    LOSS,
    OVERLAP,
    STUDENT_MASS,
    TEACHER_MASS,
    TRAINING_ACCURACY,
    Accuracies,
)

PAIRS = {
    "student-base": ("base from teacher-post", "base from teacher-big"),
    "teacher-big": ("big from teacher-post", "big from student-base"),
}
STANDSTILL = 0.05
FIRST, LAST = Window.FIRST, Window.LAST


def claims(found: Findings) -> Sequence[Claim]:
    pairs = [(student, found.arms[works], found.arms[fails]) for student, (works, fails) in PAIRS.items()]
    return [claim for pair in pairs for claim in (*_alignment(*pair), *_optimization(*pair))]


def _as_named(works: ArmFindings, fails: ArmFindings) -> list[Check]:
    """That the run said to work does, and that the one said to fail does not."""
    return [
        Check(what="gain of the working run", estimate=works.gain(), low=0, start=works.before()),
        Check(what="gain of the failing run", estimate=fails.gain(), high=STANDSTILL, start=fails.before()),
    ]


def _alignment(student: str, works: ArmFindings, fails: ArmFindings) -> list[Claim]:
    return [
        Claim(
            statement=f"One teacher helps and another does not, though it is no worse ({student}).",
            section="4.1",
            checks=_as_named(works, fails),
            conditions=[Check(what="lead of the failing run's teacher", estimate=fails.teacher_lead(), low=0)],
        ),
        Claim(
            statement=f"The working run recovers more than 80 % of the gap ({student}).",
            section="4.1",
            checks=[Check(what="share of the gap to the teacher", estimate=works.recovery(), low=0.8)],
        ),
        _contrast(student, works, fails, "The overlap ratio rises where a run works and stalls where it fails", +1,
                  "distill/overlap_ratio"),
        _contrast(student, works, fails,
                  "The overlap-token advantage nears 0 where a run works and stalls where it fails", +1,
                  "distill/overlap_advantage"),
        _contrast(student, works, fails, "The entropy gap narrows where a run works and stalls where it fails", -1,
                  "distill/entropy_gap"),
        Claim(
            statement=f"Overlap tokens hold 97 % and more of both models' mass throughout ({student}).",
            section="B.1",
            checks=[
                Check(what=f"{side}'s mass, {name} run, lowest mean of {SMOOTHED_STEPS} steps in a row", low=0.97,
                      estimate=mean_of(arm.lowest(f"distill/overlap_mass_{side}")),
                      start=arm.metric(f"distill/overlap_mass_{side}", FIRST))
                for name, arm in (("working", works), ("failing", fails)) for side in ("student", "teacher")
            ],
        ),
    ]  # fmt: skip


def _contrast(student: str, works: ArmFindings, fails: ArmFindings, statement: str, sign: int, metric: str) -> Claim:
    """The working run's metric moves in the direction of `sign`, the failing run's less than half as far, up or down.

    Two checks and no absolute value, which noise alone would move away from 0.
    """
    changes = list(zip(works.changes(metric), fails.changes(metric), strict=True))
    above = mean_of([other - sign * change / 2 for change, other in changes])
    below = mean_of([other + sign * change / 2 for change, other in changes])
    direction = {"low": 0.0} if sign > 0 else {"high": 0.0}
    return Claim(
        statement=f"{statement} ({student}).",
        section="4.1" if student == "student-base" else "B.3",
        checks=[
            Check(what="change in the working run", estimate=works.change(metric), start=works.metric(metric, FIRST),
                  **direction),
            Check(what="change in the failing run minus half the size of that", estimate=above, high=0),
            Check(what="change in the failing run plus half the size of that", estimate=below, low=0),
        ],
        conditions=_as_named(works, fails),
    )  # fmt: skip


def _optimization(student: str, works: ArmFindings, fails: ArmFindings) -> list[Claim]:
    extreme = "distill/extreme_prob_gap_abs"
    return [
        Claim(
            statement=f"The failing run starts with the smaller loss and the smaller gradient ({student}).",
            section="B.2",
            checks=[
                Check(what="reverse KL, working minus failing, first steps",
                      estimate=works.difference(fails, "loss/reverse_kl", FIRST), low=0),
                Check(what="gradient norm, working minus failing, first steps",
                      estimate=works.difference(fails, "optim/grad_norm", FIRST), low=0),
            ],
            conditions=_as_named(works, fails),
        ),
        Claim(
            statement=f"The gap at the most extreme token narrows where a run works, not where it fails ({student}).",
            section="B.2",
            checks=[
                Check(what="change in the working run", estimate=works.change(extreme),
                      start=works.metric(extreme, FIRST), high=0),
                Check(what="failing minus working, last steps", estimate=fails.difference(works, extreme, LAST), low=0,
                      start=fails.difference(works, extreme, FIRST)),
            ],
            conditions=_as_named(works, fails),
        ),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="fig06_success_failure",
    title="a run that works beside one that does not",
    figures="Figs 6, 18, 19, 20",
    section="4.1, B",
    setting=(
        "student-base from teacher-post (works) and from teacher-big (fails); teacher-big as the student from "
        "teacher-post (works) and from student-base (fails)."
    ),
    arms={
        "base from teacher-post": SUCCESS,
        "base from teacher-big": FAILURE,
        "big from teacher-post": BIG_SUCCESS,
        "big from student-base": BIG_FAILURE,
    },
    claims=claims,
    panels=(
        Accuracies(), TRAINING_ACCURACY, OVERLAP, ADVANTAGE, ENTROPY_GAP, LOSS, GRADIENT_NORM, EXTREME_GAP,
        STUDENT_MASS, TEACHER_MASS,
    ),
)  # fmt: skip
