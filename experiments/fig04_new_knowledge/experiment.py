"""Fig 4: a teacher of the same pipeline against one that was post-trained, for two students."""

from collections.abc import Sequence

from experiments.cast import BIG_FAILURE, BIG_SUCCESS, FAILURE, SUCCESS
from experiments.claims import Check, Claim
from experiments.experiment import Experiment
from experiments.findings import Findings
from experiments.panels import OVERLAP, TRAINING_ACCURACY, Accuracies

FAMILIES = {
    "student-base": ("base from teacher-post", "base from teacher-big"),
    "teacher-big": ("big from teacher-post", "big from student-base"),
}
SMALL_GAIN = 0.05
LARGE_RECOVERY = 0.5


def claims(found: Findings) -> Sequence[Claim]:
    return [claim for student, labels in FAMILIES.items() for claim in _claims_of(found, student, *labels)]


def _claims_of(found: Findings, student: str, post_label: str, same_label: str) -> Sequence[Claim]:
    post, same = found.arms[post_label], found.arms[same_label]
    share = "share of the gap to the teacher that closed"
    lead = Check(what="lead of the same-pipeline teacher", estimate=same.teacher_lead(), low=0)
    return [
        Claim(
            statement=f"A teacher of the same pipeline adds little ({student}).",
            section="3.2",
            checks=[Check(what="gain in accuracy", estimate=same.gain(), high=SMALL_GAIN, start=same.before())],
            conditions=[lead],
        ),
        Claim(
            statement=f"A post-trained teacher adds substantially more ({student}).",
            section="3.2",
            checks=[
                Check(
                    what="accuracy after, post-trained minus same pipeline",
                    estimate=post.accuracy_over(same),
                    low=SMALL_GAIN,
                )
            ],
            conditions=[lead],
        ),
        Claim(
            statement=f"A post-trained teacher's gap is recovered for the larger part ({student}).",
            section="3.2",
            checks=[Check(what=share, estimate=post.recovery(), low=LARGE_RECOVERY)],
        ),
        Claim(
            statement=f"Of a better teacher of the same pipeline, a much smaller part is recovered ({student}).",
            section="3.2",
            checks=[Check(what=share, estimate=same.recovery(), high=LARGE_RECOVERY)],
            conditions=[lead],
        ),
    ]


EXPERIMENT = Experiment(
    name="fig04_new_knowledge",
    title="new knowledge, not just scale",
    figures="Fig 4",
    section="3.2",
    setting=(
        "student-base from teacher-big (twice its size, the same demonstrations) and from teacher-post; then "
        "teacher-big as the student, from student-base and from teacher-post."
    ),
    arms={
        "base from teacher-post": SUCCESS,
        "base from teacher-big": FAILURE,
        "big from teacher-post": BIG_SUCCESS,
        "big from student-base": BIG_FAILURE,
    },
    claims=claims,
    panels=(Accuracies(), TRAINING_ACCURACY, OVERLAP),
)
