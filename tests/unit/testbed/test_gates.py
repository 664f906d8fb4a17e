"""The gates judge what runs have seen, with every bound on both of its sides."""

from typing import Any

import pytest

from testbed.gates import SEEDS, judge


def runs(*, recovery: float = 0.8, big_gain: float = 0.05, big_level: float = 0.45, other_mass: float = 0.7) -> Any:
    def three(**fields: float) -> list[dict[str, float]]:
        return [dict(fields) for _ in SEEDS]

    return {
        "post": three(
            gap_recovery=recovery, student_accuracy_before=0.4, student_accuracy_after=0.7, overlap_mass_first=0.98
        ),
        "big": three(student_accuracy_before=0.4, student_accuracy_after=0.4 + big_gain),
        "back-to-base": three(student_accuracy_after=0.42),
        "back-to-big": three(student_accuracy_after=big_level),
        "other": three(overlap_mass_first=other_mass),
    }


def test_a_family_of_the_right_shape_passes() -> None:
    assert [gate.held for gate in judge(runs())] == [True] * 4


@pytest.mark.parametrize(
    ("change", "failing"),
    [({"recovery": 0.49}, 0), ({"big_gain": 0.11}, 1), ({"big_level": 0.48}, 2), ({"other_mass": 0.99}, 3)],
)
def test_each_bound_counts(change: dict[str, float], failing: int) -> None:
    assert [gate.held for gate in judge(runs(**change))] == [index != failing for index in range(4)]


def test_one_bad_seed_fails_and_no_gap_counts_as_none() -> None:
    seen = runs()
    seen["post"][1]["gap_recovery"] = None
    assert not judge(seen)[0].held
