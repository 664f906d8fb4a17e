"""What each experiment concludes from numbers made by hand."""

from dataclasses import replace

import pytest

from experiments.claims import Claim, Verdict
from experiments.experiment import load
from experiments.findings import ArmFindings, Findings
from tests.unit.experiments.synthetic import synthetic_findings

NUM_PROBLEMS = 16


def level(accuracy: float) -> list[float]:
    """By problem, about this accuracy; the same problems are hard for everyone."""
    return [accuracy + 0.01 * (index % 5 - 2) for index in range(NUM_PROBLEMS)]


def arm_of(arm: ArmFindings, *, before: float, after: float, teacher: float, **series: list[float]) -> ArmFindings:
    """The arm with these accuracies, and these values of the metrics that it is given (`/` written as `__`)."""
    named = {name.replace("__", "/"): values for name, values in series.items()}
    runs = [
        replace(run, accuracy_by_problem=level(after + 0.001 * run.seed), series=run.series | named) for run in arm.runs
    ]
    return replace(arm, runs=runs, before_by_problem=level(before), teacher_by_problem=level(teacher))


def verdicts(name: str, found: Findings) -> dict[str, Verdict]:
    claims: list[Claim] = list(load(name).claims(found))
    return {claim.statement: claim.verdict() for claim in claims}


@pytest.mark.parametrize(("teacher", "verdict"), [(0.7, Verdict.HELD), (0.55, Verdict.CANNOT_BE_TOLD)])
def test_what_a_same_pipeline_teacher_adds_presupposes_that_it_leads(teacher: float, verdict: Verdict) -> None:
    found = synthetic_findings(load("fig04_new_knowledge"))
    for label, arm in found.arms.items():
        helps = label.endswith("teacher-post")
        accuracies = {"after": 0.88, "teacher": 0.9} if helps else {"after": 0.61, "teacher": teacher}
        found.arms[label] = arm_of(arm, before=0.6, **accuracies)
    judged = verdicts("fig04_new_knowledge", found)
    for student in ("student-base", "teacher-big"):
        assert judged[f"A teacher of the same pipeline adds little ({student})."] is verdict
        assert judged[f"A post-trained teacher adds substantially more ({student})."] is verdict
        assert judged[f"A post-trained teacher's gap is recovered for the larger part ({student})."] is Verdict.HELD


@pytest.mark.parametrize(("larger", "verdict"), [(0.65, Verdict.HELD), (0.58, Verdict.CANNOT_BE_TOLD)])
def test_that_size_makes_no_difference_presupposes_that_the_larger_teacher_leads(
    larger: float, verdict: Verdict
) -> None:
    found = synthetic_findings(load("fig05_reverse_distillation"))
    flat = {"outcome__accuracy": [0.6 + 0.001 * (step % 3) for step in range(120)]}
    for label, teacher in (("from student-base", 0.6), ("from teacher-big", larger)):
        found.arms[label] = arm_of(found.arms[label], before=0.9, after=0.6, teacher=teacher, **flat)
    judged = verdicts("fig05_reverse_distillation", found)
    assert judged["A larger teacher of the same family takes it to the same level."] is verdict
    assert judged["The two trajectories are nearly indistinguishable."] is verdict
