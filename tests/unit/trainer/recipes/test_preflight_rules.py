"""Verdicts and ranks: each rule on both sides of its threshold and across it."""

from dataclasses import replace
from typing import Any

import pytest

from services.trainer.evaluation.estimates import Estimate
from services.trainer.recipes.preflight.rules import (
    Candidate,
    Judgement,
    PilotSlopes,
    TemplateChange,
    Verdict,
    above,
    below,
    judge_compatibility,
    judge_new_knowledge,
    judge_templates,
    predict,
    rank,
)
from services.trainer.recipes.preflight.settings import Thresholds

LIMITS = Thresholds()


def around(value: float, half: float = 0.001) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


GOOD = {
    "overlap_mass_student": around(0.985),
    "overlap_mass_teacher": around(0.985),
    "overlap_ratio": around(0.8),
    "mass99_overlap": around(0.95),
    "entropy_gap_share": around(0.1),
}


def pilot(gain: Estimate | None, reverse_kl: Estimate | None) -> PilotSlopes:
    return PilotSlopes(
        num_steps=8, reverse_kl=reverse_kl, overlap_ratio=around(0.002), accuracy=around(0.0, 0.1), gain=gain
    )


def judged(verdict: Verdict) -> Judgement:
    return Judgement(verdict=verdict, evidence=(), reason="as given")


def candidate(**changes: Any) -> Candidate:
    known = Candidate(
        name="t",
        is_refused=False,
        compatible=judged(Verdict.YES),
        new_knowledge=judged(Verdict.CANNOT_BE_TOLD),
        gap=around(0.3, 0.1),
        overlap_mass=around(0.98),
    )
    return replace(known, **changes)


def test_a_threshold_speaks_only_where_the_whole_interval_lies_on_one_side() -> None:
    found = [above("x", around(value, 0.1), 0.5, "3.1").verdict for value in (0.6, 0.55, 0.45, 0.39)]
    assert found == [Verdict.YES, Verdict.UNCLEAR, Verdict.UNCLEAR, Verdict.NO]
    mirrored = [below("x", around(value, 0.1), 0.5, "3.1") for value in (0.61, 0.55, 0.45, 0.4)]
    assert [item.verdict for item in mirrored] == [Verdict.NO, Verdict.UNCLEAR, Verdict.UNCLEAR, Verdict.YES]
    assert (mirrored[0].estimate, mirrored[0].threshold) == (around(0.61, 0.1), 0.5)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, Verdict.YES),
        # A small vocabulary: the ratio is low because most of a top-k has no probability.
        ({"overlap_ratio": around(0.5)}, Verdict.YES),
        ({"mass99_overlap": around(0.9, 0.05)}, Verdict.YES),
        ({"overlap_ratio": around(0.5), "mass99_overlap": around(0.9, 0.05)}, Verdict.UNCLEAR),
        ({"overlap_mass_teacher": around(0.96)}, Verdict.UNCLEAR),
        ({"overlap_mass_student": around(0.97, 0.01)}, Verdict.UNCLEAR),
        ({"overlap_mass_teacher": around(0.8)}, Verdict.NO),
        ({"mass99_overlap": around(0.85)}, Verdict.NO),
        ({"entropy_gap_share": around(1.5)}, Verdict.NO),
    ],
)
def test_condition_1_needs_mass_and_agreement(changes: dict[str, Estimate], verdict: Verdict) -> None:
    assert judge_compatibility(GOOD | changes, LIMITS).verdict is verdict


def test_condition_1_does_without_entropies_and_names_its_evidence() -> None:
    without = {name: value for name, value in GOOD.items() if name != "entropy_gap_share"}
    judgement = judge_compatibility(without | {"overlap_mass_teacher": around(0.8)}, LIMITS)
    assert judgement.reason == "low: overlap mass, teacher, at least"
    assert {item.section for item in judgement.evidence} == {"4.1, B.1", "C.2", "3.1, 4.1", ""}


@pytest.mark.parametrize("name", [name for name in GOOD if name != "entropy_gap_share"])
def test_condition_1_is_not_told_without_what_it_rests_on(name: str) -> None:
    judgement = judge_compatibility({key: value for key, value in GOOD.items() if key != name}, LIMITS)
    assert judgement.verdict is Verdict.CANNOT_BE_TOLD
    assert name in judgement.reason
    assert predict(candidate(compatible=judgement), LIMITS)[0] == "possible gain"


def test_thresholds_are_settings() -> None:
    metrics = GOOD | {"mass99_overlap": around(0.85)}
    assert judge_compatibility(metrics, Thresholds(mass99_overlap=0.8)).verdict is Verdict.YES


@pytest.mark.parametrize(
    ("slopes", "verdict", "reason"),
    [
        (None, Verdict.CANNOT_BE_TOLD, "no pilot"),
        (pilot(None, around(-0.01)), Verdict.CANNOT_BE_TOLD, "no answer is known"),
        (pilot(around(0.02), None), Verdict.CANNOT_BE_TOLD, "8 steps are too few"),
        (pilot(around(0.02), around(-0.01)), Verdict.YES, "accuracy rose while the student came closer"),
        (pilot(around(0.02), around(0.01)), Verdict.UNCLEAR, "came no closer"),
        (pilot(around(0.0), around(-0.01)), Verdict.UNCLEAR, "within the noise"),
        # Nothing at all has moved.
        (pilot(around(0.0, 0.0), around(-0.01)), Verdict.UNCLEAR, "within the noise"),
        (pilot(around(0.02), around(0.0, 0.0)), Verdict.UNCLEAR, "came no closer"),
        (pilot(around(-0.02), around(-0.01)), Verdict.NO, "lost accuracy"),
        (pilot(around(-0.02), around(0.01)), Verdict.NO, "lost accuracy"),
    ],
)
def test_condition_2_is_told_by_a_pilot_alone(slopes: PilotSlopes | None, verdict: Verdict, reason: str) -> None:
    judgement = judge_new_knowledge(slopes, LIMITS)
    assert judgement.verdict is verdict
    assert reason in judgement.reason


@pytest.mark.parametrize(
    ("changes", "predicted"),
    [
        ({"is_refused": True, "compatible": None}, "none"),
        ({"compatible": judged(Verdict.NO), "new_knowledge": judged(Verdict.YES)}, "risky"),
        ({"gap": around(-0.2, 0.1)}, "loss"),
        ({"gap": around(-0.05, 0.1)}, "little"),
        ({"gap": around(0.05, 0.1)}, "little"),
        ({"gap": around(0.05, 0.1), "new_knowledge": judged(Verdict.YES)}, "gain"),
        ({"new_knowledge": judged(Verdict.NO)}, "little"),
        ({"new_knowledge": judged(Verdict.YES)}, "gain"),
        ({"new_knowledge": judged(Verdict.YES), "compatible": judged(Verdict.UNCLEAR)}, "possible gain"),
        ({}, "possible gain"),
        ({"gap": None}, "possible gain"),
        ({"compatible": judged(Verdict.UNCLEAR)}, "possible gain"),
    ],
)
def test_what_is_predicted_follows_from_both_conditions(changes: dict[str, Any], predicted: str) -> None:
    assert predict(candidate(**changes), LIMITS)[0] == predicted


def test_equals_are_ordered_by_the_pilot_then_the_lead_then_the_mass() -> None:
    teachers = [
        candidate(name="refused", is_refused=True, compatible=None),
        candidate(name="unfit", compatible=judged(Verdict.NO)),
        candidate(name="worse", gap=around(-0.2, 0.1)),
        candidate(name="equal", gap=around(0.0, 0.1)),
        candidate(name="low-mass", overlap_mass=around(0.97)),
        candidate(name="high-mass", overlap_mass=around(0.99)),
        candidate(name="ahead", gap=around(0.5, 0.1)),
        candidate(name="piloted", pilot_gain=around(0.01)),
    ]
    ranked = rank(teachers, LIMITS)
    order = ["piloted", "ahead", "high-mass", "low-mass", "equal", "worse", "unfit", "refused"]
    assert [item.name for item in ranked] == order
    assert [item.place for item in ranked] == list(range(1, 9))


def test_a_lead_that_is_certain_may_still_be_too_small_to_matter() -> None:
    lead = candidate(gap=around(0.01, 0.005))
    assert predict(lead, LIMITS)[0] == "possible gain"
    assert predict(lead, Thresholds(accuracy_gap=0.05))[0] == "little"


def change(ratio: float, mass: float = 0.0) -> TemplateChange:
    return TemplateChange(overlap_ratio=around(ratio), overlap_mass=around(mass), reverse_kl=around(0.0))


@pytest.mark.parametrize(
    ("changes", "best"),
    [
        ({}, None),
        ({"boxed": change(0.05), "dapo": change(0.02)}, "boxed"),
        ({"boxed": change(0.05, mass=-0.1), "dapo": change(0.02)}, "dapo"),
        ({"boxed": change(-0.05), "dapo": change(-0.02)}, "as-is"),
        ({"boxed": change(-0.05), "dapo": change(0.0)}, None),
        ({"boxed": TemplateChange(overlap_ratio=None, overlap_mass=None, reverse_kl=None)}, None),
    ],
)
def test_a_template_is_named_where_it_raises_the_ratio_for_certain(
    changes: dict[str, TemplateChange], best: str | None
) -> None:
    assert judge_templates(changes, "as-is")[0] == best
