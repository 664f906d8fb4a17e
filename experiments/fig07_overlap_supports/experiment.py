"""Fig 7: which tokens carry the gain, those that both models rank high or the others."""

from collections.abc import Sequence
from dataclasses import replace

from experiments.arms import Arm
from experiments.cast import SUCCESS
from experiments.claims import Check, Claim, within
from experiments.experiment import Experiment
from experiments.findings import ArmFindings, Findings, Window
from experiments.panels import ADVANTAGE, GRADIENT_NORM, OVERLAP, TRAINING_ACCURACY, Accuracies

FORMS = ("policy", "exact")
SUPPORTS = ("student", "overlap", "non_overlap")
RAW = "policy: non-overlap, raw weights"
MATCH = 0.04
RATIO = "distill/overlap_ratio"


def label_of(form: str, support: str) -> str:
    return f"{form}: {support.replace('_', '-')}"


def arm_of(form: str, support: str) -> Arm:
    settings = {} if support == "student" else {"objective.support": support}
    return replace(SUCCESS, settings=settings if form == "policy" else {**settings, "objective.gradient": form})


RAW_ARM = replace(SUCCESS, settings={"objective.support": "non_overlap", "objective.renormalize": False})
"""The published code leaves the weights of this support as they are, which shrinks its gradient with its mass."""


def claims(found: Findings) -> Sequence[Claim]:
    raw, student = found.arms[RAW], found.arms[label_of("policy", "student")]
    return [claim for form in FORMS for claim in _claims_of(found, form)] + _others("policy, raw weights", raw, student)


def _claims_of(found: Findings, form: str) -> list[Claim]:
    student, overlap, others = (found.arms[label_of(form, support)] for support in SUPPORTS)
    match = overlap.accuracy_over(student)
    return [
        Claim(
            statement=f"Training on the overlap alone matches the student's top k ({form}).",
            section="4.2",
            checks=[
                Check(what="accuracy after, overlap minus student's top k", estimate=match, **within(MATCH)),
            ],
        ),
        Claim(
            statement=f"The overlap ratio rises with both the student's top k and the overlap ({form}).",
            section="4.2",
            checks=[
                Check(what=f"change with {name}", estimate=arm.change(RATIO), start=arm.metric(RATIO, Window.FIRST),
                      low=0)
                for name, arm in (("student's top k", student), ("overlap", overlap))
            ],
        ),
        *_others(form, others, student),
    ]  # fmt: skip


def _others(form: str, others: ArmFindings, student: ArmFindings) -> list[Claim]:
    """What the paper says of the tokens that one model alone ranks high."""
    return [
        Claim(
            statement=f"Training on the other tokens is weaker ({form}).",
            section="4.2",
            checks=[
                Check(what="accuracy after, non-overlap minus student's top k", estimate=others.accuracy_over(student),
                      high=0),
            ],
        ),
        Claim(
            statement=f"With the other tokens the overlap ratio first falls ({form}).",
            section="4.2",
            checks=[
                Check(what="change from the first to the middle steps", high=0,
                      estimate=others.change(RATIO, end=Window.MIDDLE), start=others.metric(RATIO, Window.FIRST)),
            ],
        ),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="fig07_overlap_supports",
    title="overlap tokens alone",
    figures="Fig 7",
    section="4.2",
    setting=(
        "student-base from teacher-post, on the student's top k, on the overlap of both top k and on the tokens in one "
        "of them only; with the policy gradient, as published also with raw weights, and with the exact gradient."
    ),
    arms={label_of(form, support): arm_of(form, support) for form in FORMS for support in SUPPORTS} | {RAW: RAW_ARM},
    claims=claims,
    panels=(Accuracies(), TRAINING_ACCURACY, OVERLAP, ADVANTAGE, GRADIENT_NORM),
)
