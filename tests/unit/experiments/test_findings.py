"""From a run's files to numbers, and through JSON unchanged."""

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from experiments.experiment import load
from experiments.findings import ArmFindings, Findings, Run, Window, findings_of, run_of
from tests.unit.experiments.synthetic import synthetic_findings, synthetic_run

RATIO = "distill/overlap_ratio"


def arm_of(*series: list[float | None]) -> ArmFindings:
    run = synthetic_run(np.random.default_rng(0), 0, "key")
    runs = [replace(run, seed=seed, series={RATIO: values}) for seed, values in enumerate(series)]
    return ArmFindings(
        student="s", teacher="t", settings={}, runs=runs, before_by_problem=[0.5], teacher_by_problem=[1.0],
        evaluation_keys=[],
    )  # fmt: skip


def records() -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            RATIO: step / 3,
            "timing/step": 1.0,
            "distill/position_edges": [0.0, 16.0],
            f"{RATIO}/by_position": [0.1 * step, None],
        }
        for step in range(1, 11)
    ]


def test_a_run_keeps_what_is_measured_and_nothing_else() -> None:
    evaluation = {"accuracy_by_problem": [0.5, 1.0], "by_level": {"1": {"accuracy": {"value": 0.75}}}}
    run = run_of(7, "key", records(), evaluation)
    assert run.series == {RATIO: [float(f"{step / 3:.6g}") for step in range(1, 11)]}
    assert run.steps == list(range(1, 11))
    assert run.by_position[RATIO]["first"] == [[0.1, None], [0.2, None], [0.3, None]]
    assert run.by_position[RATIO]["last"][-1] == [1.0, None]
    assert (run.accuracy_by_problem, run.accuracy_by_level) == ([0.5, 1.0], {"1": 0.75})
    assert run.position_edges == [0.0, 16.0]


def test_a_metric_missing_in_a_step_is_left_out_of_its_window() -> None:
    lines = records()
    del lines[1][RATIO]
    run = run_of(0, "key", lines, {"accuracy_by_problem": [1.0], "by_level": {}})
    assert run.window(RATIO, Window.FIRST) == pytest.approx([1 / 3, 1], abs=1e-5)
    assert run.window("not/there", Window.ALL) == []


def test_findings_survive_json() -> None:
    findings = synthetic_findings(load("fig11_response_length"))
    plain = json.loads(json.dumps(findings.as_json()))
    assert findings_of(plain) == findings
    assert isinstance(findings_of(plain), Findings)
    assert isinstance(findings_of(plain).arms["up to 32 tokens"].runs[0], Run)
    assert asdict(findings_of(plain)) == asdict(findings)


def test_a_change_over_several_seeds_is_paired() -> None:
    """Each seed rises by 0.1 to 0.12 from a level of its own: the spread of the levels must not count."""
    arm = arm_of(*([level] * 5 + [level + rise] * 5 for level, rise in ((0.2, 0.1), (0.5, 0.11), (0.8, 0.12))))
    change = arm.change(RATIO)
    assert change is not None
    assert change.value == pytest.approx(0.11)
    assert 0 < change.low < change.high < 0.15
    assert arm.changes(RATIO) == pytest.approx([0.1, 0.11, 0.12])


def test_with_one_seed_steps_stand_in_for_seeds() -> None:
    arm = arm_of([0.1, 0.2, 0.3, 0.9, 0.5, 0.6, 0.7, 0.5, 0.6])
    level, change = arm.metric(RATIO, Window.FIRST), arm.change(RATIO)
    assert level is not None and change is not None
    assert level.value == pytest.approx(0.2)
    assert change.value == pytest.approx(0.58 - 0.2)
    assert arm_of([None, None]).metric(RATIO, Window.ALL) is None


def test_arms_of_equal_seeds_are_compared_seed_by_seed() -> None:
    one = arm_of([0.3] * 9, [0.6] * 9, [0.9] * 9)
    two = arm_of([0.2] * 9, [0.5] * 9, [0.8] * 9)
    difference = one.difference(two, RATIO, Window.ALL)
    assert difference is not None
    assert (difference.low, difference.high) == pytest.approx((0.1, 0.1))
    unpaired = one.difference(replace(two, runs=two.runs[:2]), RATIO, Window.ALL)
    assert unpaired is not None
    assert unpaired.low < 0


def test_the_largest_gap_is_that_of_smoothed_curves_at_their_widest() -> None:
    flat = [0.5] * 12
    bump = [0.5] * 4 + [0.3, 0.25, 0.35, None] + [0.5] * 4
    found = arm_of(flat).largest_gap(arm_of(bump), RATIO, 3)
    assert found is not None
    assert found.value == pytest.approx(0.2)
    half = 4.303 * 0.05 / 3**0.5
    assert found.low == pytest.approx(0.2 - half, abs=1e-4)
    # Wider still at its uncertain ends: steps of 0, 0.2, 0.25 and of 0.25, 0.15, 0.
    assert found.high == pytest.approx(0.15 + 4.303 * np.std([0, 0.2, 0.25], ddof=1) / 3**0.5, abs=1e-4)
    same = arm_of(flat).largest_gap(arm_of(flat), RATIO, 3)
    assert same is not None and (same.low, same.value, same.high) == (0, 0, 0)
    assert arm_of(flat).largest_gap(arm_of(flat), RATIO, 13) is None
