"""Table 1: reinforcement learning from verified rewards, which makes the teachers of Figs 2, 9 and 10.

GRPO's rate and steps were chosen in sight of what is claimed; `GRPO_CHOICE` says how and stands beside the results.
"""

from collections.abc import Sequence

from experiments.cast import GRPO, GRPO_CHOICE
from experiments.claims import Check, Claim
from experiments.experiment import Experiment
from experiments.findings import Findings, Window
from experiments.panels import GRADIENT_NORM, LENGTH, STUDENT_ENTROPY, TRAINING_ACCURACY, Accuracies

LABEL = "student-base, GRPO"


def claims(found: Findings) -> Sequence[Claim]:
    arm = found.arms[LABEL]
    metric = "outcome/accuracy"
    return [
        Claim(
            statement="Verified rewards alone raise the accuracy on problems that were not trained on.",
            section="A.1",
            checks=[Check(what="gain in accuracy", estimate=arm.gain(), start=arm.before(), low=0)],
        ),
        Claim(
            statement="The accuracy of training rollouts rises.",
            section="A.1",
            checks=[
                Check(
                    what="change from the first to the last steps",
                    estimate=arm.change(metric),
                    start=arm.metric(metric, Window.FIRST),
                    low=0,
                )
            ],
        ),
    ]


EXPERIMENT = Experiment(
    name="table1_grpo",
    title="GRPO from verified rewards",
    figures="Table 1",
    section="A.1",
    setting=(
        "student-base with 8 rollouts of each prompt in the template boxed, no KL term and the mean over "
        "tokens. Nobody scores."
    ),
    arms={LABEL: GRPO},
    caveat=GRPO_CHOICE,
    claims=claims,
    panels=(Accuracies(), TRAINING_ACCURACY, STUDENT_ENTROPY, LENGTH, GRADIENT_NORM),
)
