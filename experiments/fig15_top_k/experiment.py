"""Figs 15 and 16: how many tokens of a position are supervised."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from experiments.arms import Arm
from experiments.cast import NO_SUPPORT, SUCCESS
from experiments.claims import Check, Claim, within
from experiments.estimates import difference_of
from experiments.experiment import Experiment
from experiments.findings import ArmFindings, Findings
from experiments.panels import GRADIENT_NORM, OVERLAP, STUDENT_ENTROPY, TRAINING_ACCURACY, Accuracies

FORMS = ("policy", "exact")
SIZES = (1, 4, 16, 64)
SAMPLED = "sampled token"
MATCH = 0.04


def label_of(form: str, size: int) -> str:
    return f"{form}, k = {size}"


def arm_of(form: str, size: int) -> Arm:
    settings = {"objective.score_top_k": size}
    return replace(SUCCESS, settings=settings if form == "policy" else {**settings, "objective.gradient": form})


def claims(found: Findings) -> Sequence[Claim]:
    return [claim for form in FORMS for claim in _claims_of(found, form)] + _top_one(found)


def _claims_of(found: Findings, form: str) -> list[Claim]:
    by_size = {size: found.arms[label_of(form, size)] for size in SIZES}
    sampled = found.arms[SAMPLED]
    return [
        Claim(
            statement=f"The sampled token alone does about as well as the top 4, 16 and 64 ({form}).",
            section="6.3",
            checks=[
                Check(what=f"accuracy after, sampled token minus k = {size}",
                      estimate=sampled.accuracy_over(by_size[size]), **within(MATCH))
                for size in SIZES[1:]
            ],
        ),
        Claim(
            statement=f"Beyond k = 4 there is little to gain ({form}).",
            section="6.3",
            checks=[
                Check(what=f"accuracy after, k = {size} minus k = 4",
                      estimate=by_size[size].accuracy_over(by_size[4]), high=MATCH)
                for size in SIZES[2:]
            ],
        ),
    ]  # fmt: skip


def _top_one(found: Findings) -> list[Claim]:
    """Of the policy gradient alone: the exact one is 0 on a support of one token, so it is worse whatever happens."""
    one, *larger = (found.arms[label_of("policy", size)] for size in SIZES)
    sixteen = larger[SIZES.index(16) - 1]
    return [
        Claim(
            statement="The top 1 alone does clearly worse (policy).",
            section="6.3",
            checks=[
                Check(what=f"accuracy after, k = 1 minus k = {size}",
                      estimate=one.accuracy_over(arm), high=0)
                for size, arm in zip(SIZES[1:], larger, strict=True)
            ],
        ),
        Claim(
            statement="With the top 1 alone gradients and entropy spike (policy).",
            section="6.3",
            checks=[
                Check(what=f"largest {metric} as a multiple of its median, k = 1 minus k = 16", low=0,
                      estimate=difference_of(_peaks(one, metric), _peaks(sixteen, metric)))
                for metric in ("optim/grad_norm", "distill/entropy_student")
            ],
        ),
    ]  # fmt: skip


def _peaks(arm: ArmFindings, metric: str) -> list[float]:
    known = [[value for value in run.series.get(metric, []) if value is not None] for run in arm.runs]
    return [max(values) / median(values) for values in known if values and median(values) > 0]


EXPERIMENT = Experiment(
    name="fig15_top_k",
    title="the size of the support",
    figures="Figs 15, 16",
    section="6.3",
    setting=(
        "student-base from teacher-post with k = 1, 4, 16 and 64 of 512 tokens, with the policy and the exact "
        "gradient, and with the sampled token alone. k is also that of the overlap metrics."
    ),
    arms={label_of(form, size): arm_of(form, size) for form in FORMS for size in SIZES}
    | {SAMPLED: replace(SUCCESS, settings={**NO_SUPPORT, "objective.kind": "sampled_token"})},
    claims=claims,
    panels=(Accuracies(), TRAINING_ACCURACY, OVERLAP, STUDENT_ENTROPY, GRADIENT_NORM),
)
