"""Figs 9 and 22: prompts in the template that the teacher was post-trained with, and in another.

GRPO's rate and steps were chosen in sight of what is claimed; `GRPO_CHOICE` says how and stands beside the results.
"""

from collections.abc import Sequence

from experiments.arms import Arm, Evaluation
from experiments.cast import BASE, GRPO, GRPO_CHOICE
from experiments.claims import Check, Claim
from experiments.experiment import Experiment
from experiments.findings import Findings, Window
from experiments.panels import OVERLAP, STUDENT_MASS, TRAINING_ACCURACY, Accuracies, ByLevel

ALIGNED, ORIGINAL = "boxed: as the teacher was trained", "dapo"
ALIGNED_ARM = Arm(
    student=BASE, teacher=GRPO, settings={"data.template": "boxed"}, evaluation=Evaluation(template="boxed")
)
"""Graded in its own template, as the other arm is in its."""


def claims(found: Findings) -> Sequence[Claim]:
    aligned, original = found.arms[ALIGNED], found.arms[ORIGINAL]
    ratio = "distill/overlap_ratio"
    return [
        Claim(
            statement="The teacher's template raises the final accuracy.",
            section="5.2",
            checks=[
                Check(
                    what="accuracy after, aligned minus original", estimate=aligned.accuracy_over(original),
                    start=aligned.before_over(original), low=0,
                )
            ],
        ),
        Claim(
            statement="The teacher's template raises the share of the gap that is recovered.",
            section="C.4",
            checks=[Check(what="recovery, aligned minus original", estimate=aligned.recovery_over(original), low=0)],
        ),
        Claim(
            statement="With the teacher's template the overlap ratio begins and ends higher.",
            section="5.2",
            checks=[
                Check(
                    what=f"overlap ratio, aligned minus original, {window.name.lower()} steps",
                    estimate=aligned.difference(original, ratio, window), low=0,
                    start=aligned.difference(original, ratio, Window.FIRST) if window is not Window.FIRST else None,
                )
                for window in (Window.FIRST, Window.LAST)
            ],
        ),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="fig09_template",
    title="the template of the teacher's post-training",
    figures="Figs 9, 22",
    section="5.2, C.4",
    setting=(
        "The teacher is student-base after GRPO on prompts in the template boxed; student-base learns from it on the "
        "same problems asked in boxed and in dapo. Both templates were as common in the student's own first training."
    ),
    arms={ALIGNED: ALIGNED_ARM, ORIGINAL: Arm(student=BASE, teacher=GRPO)},
    caveat=GRPO_CHOICE,
    claims=claims,
    panels=(Accuracies(), ByLevel(), TRAINING_ACCURACY, OVERLAP, STUDENT_MASS),
)
