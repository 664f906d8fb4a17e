"""Fig 5: a post-trained student is distilled back, from its own checkpoint before and from a larger model."""

from collections.abc import Sequence

from experiments.arms import Arm
from experiments.cast import BASE, BIG, POST
from experiments.claims import Check, Claim, within
from experiments.estimates import of_accuracies
from experiments.experiment import Experiment
from experiments.findings import Findings
from experiments.panels import OVERLAP, TRAINING_ACCURACY, Accuracies

OWN, LARGER = "from student-base", "from teacher-big"
SAME = 0.05
NEARBY_STEPS = 20
INDISTINGUISHABLE = 0.1
"""Twice `SAME`: the difference of two means of 20 steps of 64 rollouts is uncertain by about 0.04 by itself."""
# After the base's 32 steps both students are still falling.
LONGER = {"steps": 120}


def claims(found: Findings) -> Sequence[Claim]:
    own, larger = found.arms[OWN], found.arms[LARGER]
    left = of_accuracies(lambda after, teacher: after - teacher, own.after_SP, own.teacher_SP)
    larger_leads = Check(
        what="accuracy of the teachers, larger minus own",
        estimate=of_accuracies(lambda one, two: one - two, larger.teacher_SP, own.teacher_SP),
        low=0,
    )
    return [
        Claim(
            statement="Distilled from its own checkpoint before post-training, a student falls back to that level.",
            section="3.3",
            checks=[
                Check(what="gain in accuracy", estimate=own.gain(), high=0, start=own.before()),
                Check(what="accuracy after minus that of the checkpoint", estimate=left, **within(SAME)),
            ],
        ),
        Claim(
            statement="A larger teacher of the same family takes it to the same level.",
            section="3.3",
            checks=[
                Check(
                    what="accuracy after, larger minus own",
                    estimate=larger.accuracy_over(own),
                    **within(SAME),
                )
            ],
            conditions=[larger_leads],
        ),
        Claim(
            statement="The two trajectories are nearly indistinguishable.",
            section="3.3",
            checks=[
                Check(
                    what=f"largest gap in accuracy of training rollouts, means of {NEARBY_STEPS} steps in a row",
                    estimate=larger.largest_gap(own, "outcome/accuracy", NEARBY_STEPS),
                    high=INDISTINGUISHABLE,
                )
            ],
            conditions=[larger_leads],
        ),
        Claim(
            statement="The student falls back although the larger teacher scores higher than it does.",
            section="3.3",
            checks=[Check(what="gain in accuracy", estimate=larger.gain(), high=0, start=larger.before())],
            conditions=[Check(what="lead of the larger teacher", estimate=larger.teacher_lead(), low=0)],
        ),
    ]


EXPERIMENT = Experiment(
    name="fig05_reverse_distillation",
    title="reverse distillation",
    figures="Fig 5",
    section="3.3",
    setting="teacher-post as the student, from student-base (its own checkpoint before) and from teacher-big.",
    arms={
        OWN: Arm(student=POST, teacher=BASE, settings=LONGER, minutes=4.5),
        LARGER: Arm(student=POST, teacher=BIG, settings=LONGER, minutes=5.0),
    },
    claims=claims,
    panels=(Accuracies(), TRAINING_ACCURACY, OVERLAP),
)
