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


RATIO = "distill__overlap_ratio"
STALLS = "The overlap ratio rises where a run works and stalls where it fails (student-base)."
CONTRASTS = (
    STALLS,
    "The overlap-token advantage nears 0 where a run works and stalls where it fails (student-base).",
    "The entropy gap narrows where a run works and stalls where it fails (student-base).",
    "The failing run starts with the smaller loss and the smaller gradient (student-base).",
    "The gap at the most extreme token narrows where a run works, not where it fails (student-base).",
)


def side_by_side(
    *, fall: float = 0.0, gains: tuple[float, float] = (0.3, 0.0), mass: list[float] | None = None
) -> dict[str, Verdict]:
    """The working run's ratio rises by 0.3 and the failing one's falls by `fall`; the masses are alike in both."""
    found = synthetic_findings(load("fig06_success_failure"))
    masses = {f"distill__overlap_mass_{side}": mass or [0.99] * 32 for side in ("student", "teacher")}
    for label, rise, gain in (("base from teacher-post", 0.3, gains[0]), ("base from teacher-big", -fall, gains[1])):
        ratios = [0.5] * 3 + [0.5 + rise] * 29
        accuracies = {"before": 0.5, "after": 0.5 + gain, "teacher": 0.9}
        found.arms[label] = arm_of(found.arms[label], **accuracies, **{RATIO: ratios}, **masses)
    return verdicts("fig06_success_failure", found)


@pytest.mark.parametrize(
    ("fall", "verdict"),
    [(0.0, Verdict.HELD), (0.1, Verdict.HELD), (0.2, Verdict.DID_NOT_HOLD), (-0.2, Verdict.DID_NOT_HOLD)],
)
def test_a_run_stalls_that_moves_neither_up_nor_down(fall: float, verdict: Verdict) -> None:
    assert side_by_side(fall=fall)[STALLS] is verdict


@pytest.mark.parametrize("gains", [(0.3, 0.2), (-0.1, 0.0)])
def test_contrasts_presuppose_that_one_run_works_and_the_other_fails(gains: tuple[float, float]) -> None:
    judged = side_by_side(gains=gains)
    assert {judged[statement] for statement in CONTRASTS} == {Verdict.CANNOT_BE_TOLD}


@pytest.mark.parametrize(
    ("mass", "verdict"),
    [
        ([0.99] * 32, Verdict.HELD),
        ([0.99] * 12 + [0.9] * 5 + [0.99] * 15, Verdict.DID_NOT_HOLD),
        ([0.99] * 12 + [0.93] + [0.99] * 19, Verdict.HELD),
    ],
)
def test_throughout_means_at_the_lowest(mass: list[float], verdict: Verdict) -> None:
    """A dip of five steps refutes although the mean over the run is 0.976; one step may be noise."""
    statement = "Overlap tokens hold 97 % and more of both models' mass throughout (student-base)."
    assert side_by_side(mass=mass)[statement] is verdict


@pytest.mark.parametrize("largest", [0.9, 0.7])
def test_there_is_little_to_gain_also_where_more_is_worse(largest: float) -> None:
    found = synthetic_findings(load("fig15_top_k"))
    for label, arm in found.arms.items():
        found.arms[label] = arm_of(arm, before=0.5, after=largest if label.endswith("= 64") else 0.8, teacher=0.9)
    expected = Verdict.HELD if largest < 0.8 else Verdict.DID_NOT_HOLD
    judged = verdicts("fig15_top_k", found)
    assert judged["Beyond k = 4 there is little to gain (policy)."] is expected
    assert judged["Beyond k = 4 there is little to gain (exact)."] is expected


def test_nothing_is_concluded_from_a_gradient_that_is_zero_by_construction() -> None:
    claims = load("fig15_top_k").claims(synthetic_findings(load("fig15_top_k")))
    about_one = {claim.statement for claim in claims if "op 1 alone" in claim.statement}
    assert about_one and all("policy" in statement for statement in about_one)
    assert not [
        check.what for claim in claims if "exact" in claim.statement for check in claim.checks if "= 1 " in check.what
    ]


def test_trajectories_that_cross_are_not_indistinguishable() -> None:
    """One falls early and the other late: their means over the run are equal."""
    early = [0.9] * 20 + [0.6] * 40 + [0.6] * 40 + [0.6] * 20
    late = [0.9] * 20 + [0.9] * 40 + [0.3] * 40 + [0.6] * 20
    found = synthetic_findings(load("fig05_reverse_distillation"))
    for label, teacher, series in (("from student-base", 0.6, early), ("from teacher-big", 0.7, late)):
        found.arms[label] = arm_of(found.arms[label], before=0.9, after=0.6, teacher=teacher, outcome__accuracy=series)
    judged = verdicts("fig05_reverse_distillation", found)
    assert judged["The two trajectories are nearly indistinguishable."] is Verdict.DID_NOT_HOLD
