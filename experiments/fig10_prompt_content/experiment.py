"""Fig 10: distillation on the very prompts of the teacher's post-training, and on others of the same domain.

GRPO's rate and steps were chosen in sight of what is claimed; `GRPO_CHOICE` says how and stands beside the results.
"""

from collections.abc import Sequence
from dataclasses import replace

from experiments.cast import GRPO, GRPO_CHOICE
from experiments.claims import Check, Claim
from experiments.experiment import Experiment
from experiments.fig09_template.experiment import ALIGNED_ARM
from experiments.findings import Findings, Window
from experiments.panels import OVERLAP, STUDENT_ENTROPY, STUDENT_MASS, TRAINING_ACCURACY, Accuracies

ALIGNED, OTHERS = "the teacher's prompts", "other prompts"


def claims(found: Findings) -> Sequence[Claim]:
    aligned, others = found.arms[ALIGNED], found.arms[OTHERS]

    def claim(statement: str, metric: str, **limits: float) -> Claim:
        check = Check(
            what=f"{metric}, aligned minus others, whole run",
            estimate=aligned.difference(others, metric, Window.ALL),
            start=aligned.difference(others, metric, Window.FIRST),
            **limits,
        )
        return Claim(statement=statement, section="5.2", checks=[check])

    return [
        Claim(
            statement="The teacher's own prompts raise the final accuracy.",
            section="5.2",
            checks=[
                Check(
                    what="accuracy after, aligned minus others", estimate=aligned.accuracy_over(others),
                    low=0,
                )
            ],
        ),
        claim("With the teacher's prompts the overlap ratio is lower.", "distill/overlap_ratio", high=0),
        claim("With the teacher's prompts the student's mass on the overlap is higher.",
              "distill/overlap_mass_student", low=0),
        claim("With the teacher's prompts the student's entropy is lower.", "distill/entropy_student", high=0),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="fig10_prompt_content",
    title="the prompts of the teacher's post-training",
    figures="Fig 10",
    section="5.2, C.3",
    setting=(
        f"The teacher is student-base after GRPO on {GRPO.data[0]}; student-base learns from it on that file and on "
        "train_2.jsonl, which holds other problems of the same kinds."
    ),
    arms={ALIGNED: ALIGNED_ARM, OTHERS: replace(ALIGNED_ARM, data=("train_2.jsonl",))},
    caveat=GRPO_CHOICE,
    claims=claims,
    panels=(Accuracies(), TRAINING_ACCURACY, OVERLAP, STUDENT_MASS, STUDENT_ENTROPY),
)
