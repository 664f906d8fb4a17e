"""Held, did not hold, cannot be told: by where the interval lies."""

import math

import pytest

from experiments.claims import Check, Claim, Verdict, within
from services.trainer.evaluation.estimates import Estimate


def check(start: float, end: float, **limits: float) -> Check:
    return Check(what="x", estimate=Estimate(value=(start + end) / 2, low=start, high=end), **limits)


@pytest.mark.parametrize(
    ("interval", "limits", "verdict"),
    [
        ((0.1, 0.3), {"low": 0.0}, Verdict.HELD),
        ((-0.1, 0.3), {"low": 0.0}, Verdict.CANNOT_BE_TOLD),
        ((-0.3, -0.1), {"low": 0.0}, Verdict.DID_NOT_HOLD),
        ((-0.04, 0.04), within(0.05), Verdict.HELD),
        ((-0.06, 0.04), within(0.05), Verdict.CANNOT_BE_TOLD),
        ((0.06, 0.09), within(0.05), Verdict.DID_NOT_HOLD),
        ((-0.09, -0.06), within(0.05), Verdict.DID_NOT_HOLD),
        # No difference at all, seen without any spread, is not "more".
        ((0.0, 0.0), {"low": 0.0}, Verdict.DID_NOT_HOLD),
        ((0.2, math.inf), {"low": 0.0}, Verdict.CANNOT_BE_TOLD),
        ((0.2, math.inf), {"high": 0.1}, Verdict.DID_NOT_HOLD),
    ],
)
def test_a_check_is_judged_by_its_interval(
    interval: tuple[float, float], limits: dict[str, float], verdict: Verdict
) -> None:
    assert check(*interval, **limits).verdict() is verdict


def test_a_number_that_is_not_there_tells_nothing() -> None:
    assert Check(what="x", estimate=None, low=0).verdict() is Verdict.CANNOT_BE_TOLD


YES, NO, PERHAPS = check(1, 2, low=0), check(-2, -1, low=0), check(-1, 1, low=0)


@pytest.mark.parametrize(
    ("checks", "conditions", "verdict"),
    [
        ((YES, YES), (), Verdict.HELD),
        ((YES, PERHAPS), (), Verdict.CANNOT_BE_TOLD),
        ((YES, PERHAPS, NO), (), Verdict.DID_NOT_HOLD),
        ((YES,), (YES,), Verdict.HELD),
        ((YES,), (NO,), Verdict.CANNOT_BE_TOLD),
        ((NO,), (PERHAPS,), Verdict.CANNOT_BE_TOLD),
    ],
)
def test_a_claim_needs_all_its_checks_and_conditions(
    checks: tuple[Check, ...], conditions: tuple[Check, ...], verdict: Verdict
) -> None:
    claim = Claim(statement="s", section="1", checks=checks, conditions=conditions)
    assert claim.verdict() is verdict
    assert claim.as_json()["verdict"] == str(verdict)


def test_json_says_what_was_found_and_what_was_claimed() -> None:
    start = Estimate(value=0.5, low=0.4, high=0.6)
    found = Check(what="gain", estimate=Estimate(value=0.2, low=0.1, high=math.inf), low=0, high=0.5, start=start)
    assert Claim(statement="s", section="1", checks=[found]).as_json()["checks"] == [
        {
            "what": "gain",
            "verdict": str(Verdict.CANNOT_BE_TOLD),
            "range": "0 to 0.5",
            "found": {"value": 0.2, "low": 0.1, "high": None},
            "start": {"value": 0.5, "low": 0.4, "high": 0.6},
        }
    ]
