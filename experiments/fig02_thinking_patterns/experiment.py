"""Figs 2, 3 and 17: two teachers of about equal accuracy, one of which thinks as the student does."""

from collections.abc import Sequence

from experiments.cast import OTHER_PATTERN, SUCCESS
from experiments.claims import Check, Claim, within
from experiments.estimates import of_accuracies
from experiments.experiment import Experiment
from experiments.findings import Findings, Window
from experiments.panels import OVERLAP, STUDENT_MASS, TRAINING_ACCURACY, Accuracies, ByLevel

POST, OTHER = "teacher-post: same pattern", "teacher-other: another pattern"


def claims(found: Findings) -> Sequence[Claim]:
    post, other = found.arms[POST], found.arms[OTHER]
    lead = of_accuracies(lambda one, two: one - two, post.teacher_SP, other.teacher_SP)
    comparable = Check(what="accuracy of the teachers, post minus other", estimate=lead, **within(0.05))
    ratio, mass = "distill/overlap_ratio", "distill/overlap_mass_student"
    first_gap = post.difference(other, ratio, Window.FIRST)
    closing = Check(
        what="overlap ratio, post minus other, at the end", estimate=post.difference(other, ratio, Window.LAST),
        start=first_gap, **within(0.03),
    )  # fmt: skip
    return [
        Claim(
            statement="The teacher that thinks as the student does starts with the higher overlap ratio.",
            section="3.1",
            checks=[Check(what="overlap ratio, post minus other, first steps", estimate=first_gap, low=0)],
            note="Ids without probability rank alike only for models of one descent, so the mass is the fairer check.",
        ),
        Claim(
            statement="The teacher that thinks as the student does starts with the higher overlap mass.",
            section="3.1, B.1",
            checks=[
                Check(
                    what="student mass on the overlap, post minus other, first steps",
                    estimate=post.difference(other, mass, Window.FIRST),
                    low=0,
                )
            ],
        ),
        Claim(
            statement="Of two comparable teachers, the one that thinks as the student does makes the better student.",
            section="3.1",
            checks=[
                Check(
                    what="accuracy after, post minus other",
                    estimate=post.accuracy_over(other),
                    low=0,
                )
            ],
            conditions=[comparable],
        ),
        Claim(statement="The two overlap curves converge later.", section="3.1", checks=[closing]),
    ]


EXPERIMENT = Experiment(
    name="fig02_thinking_patterns",
    title="two teachers, one with the student's pattern of thinking",
    figures="Figs 2, 3, 17",
    section="3.1",
    setting=(
        "student-base from teacher-post (its own descendant, same way to solve) and from teacher-other (as accurate, "
        "rounds instead of working in columns)."
    ),
    arms={POST: SUCCESS, OTHER: OTHER_PATTERN},
    claims=claims,
    panels=(Accuracies(), ByLevel(), OVERLAP, TRAINING_ACCURACY, STUDENT_MASS),
)
