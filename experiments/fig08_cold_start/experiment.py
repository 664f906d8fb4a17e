"""Figs 8 and 21: supervised training on the teacher's own solutions before distillation.

The size of the cold start was chosen in sight of what is claimed; `COLD_START_CHOICE` says how and stands beside the
results.
"""

from collections.abc import Sequence
from dataclasses import replace

from experiments.cast import COLD_START, COLD_START_CHOICE, OTHER_PATTERN
from experiments.claims import Check, Claim
from experiments.experiment import Experiment
from experiments.findings import Findings, Window
from experiments.panels import ENTROPY_GAP, OVERLAP, STUDENT_MASS, TEACHER_MASS, TRAINING_ACCURACY, Accuracies

COLD, DIRECT = "after a cold start", "directly"
FIRST = Window.FIRST


def claims(found: Findings) -> Sequence[Claim]:
    cold, direct = found.arms[COLD], found.arms[DIRECT]

    def lead(metric: str, window: Window) -> Check:
        return Check(
            what=f"{metric}, cold start minus direct, {window.name.lower()} steps",
            estimate=cold.difference(direct, metric, window),
            start=cold.difference(direct, metric, FIRST) if window is not FIRST else None,
            low=0,
        )

    gap = "distill/entropy_gap"
    return [
        Claim(
            statement="After a cold start the overlap ratio begins higher.",
            section="5.1",
            checks=[lead("distill/overlap_ratio", FIRST)],
        ),
        Claim(
            statement="After a cold start the entropy gap begins smaller.",
            section="5.1",
            checks=[
                Check(
                    what="entropy gap, cold start minus direct, first steps",
                    estimate=cold.difference(direct, gap, FIRST),
                    high=0,
                )
            ],
        ),
        Claim(
            statement="After a cold start both overlap masses are higher, at first and over the whole run.",
            section="C.2",
            checks=[
                lead(f"distill/overlap_mass_{side}", window)
                for side in ("student", "teacher")
                for window in (FIRST, Window.ALL)
            ],
        ),
        Claim(
            statement="A cold start raises the final accuracy.",
            section="5.1",
            checks=[
                Check(
                    what="accuracy after, cold start minus direct",
                    estimate=cold.accuracy_over(direct),
                    start=cold.before_over(direct),
                    low=0,
                )
            ],
        ),
    ]


EXPERIMENT = Experiment(
    name="fig08_cold_start",
    title="a cold start before distillation",
    figures="Figs 8, 21",
    section="5.1, C.2",
    setting=(
        "student-base from teacher-other, directly and after supervised training on filtered solutions of "
        "teacher-other; the prompts of the two stages are disjoint."
    ),
    arms={COLD: replace(OTHER_PATTERN, student=COLD_START), DIRECT: OTHER_PATTERN},
    caveat=COLD_START_CHOICE,
    claims=claims,
    panels=(Accuracies(), TRAINING_ACCURACY, OVERLAP, ENTROPY_GAP, STUDENT_MASS, TEACHER_MASS),
)
