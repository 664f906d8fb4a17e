"""Claims of the paper, judged from numbers: held, did not hold, or cannot be told at this scale.

A check is a number with an interval and the open range that the claim says it lies in. An interval inside the range
supports the claim, one outside refutes it, one across a bound says nothing. A claim with several checks holds when all
do, and does not when one does not. Conditions are checks of the setting: where the testbed does not have what the paper
had, nothing can be told whatever the numbers are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypedDict

from services.trainer.evaluation.estimates import Estimate


class Verdict(StrEnum):
    HELD = "held"
    DID_NOT_HOLD = "did not hold"
    CANNOT_BE_TOLD = "cannot be told at this scale"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One number against one range. Example: ``Check(what="gain", estimate=gain, low=0.0)``."""

    what: str
    estimate: Estimate | None
    """None where the number does not exist, such as a share of a gap that is not there."""
    low: float = -math.inf
    high: float = math.inf
    start: Estimate | None = None
    """Where the quantity stood before training, when `estimate` is a change or a final value.

    Of a difference between two arms it is their difference then, and absent where both began as one model.
    """

    def verdict(self) -> Verdict:
        if self.estimate is None:
            return Verdict.CANNOT_BE_TOLD
        if self.low < self.estimate.low and self.estimate.high < self.high:
            return Verdict.HELD
        if self.estimate.high <= self.low or self.estimate.low >= self.high:
            return Verdict.DID_NOT_HOLD
        return Verdict.CANNOT_BE_TOLD

    def range_text(self) -> str:
        """`> 0`, `< 0.05` or `-0.05 to 0.05`."""
        if math.isinf(self.high):
            return f"> {self.low:g}"
        return f"< {self.high:g}" if math.isinf(self.low) else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A statement of the paper and what it says of our numbers."""

    statement: str
    section: str
    """Of the paper."""
    checks: Sequence[Check]
    conditions: Sequence[Check] = ()
    """What has to be so for the checks to say anything of the statement."""
    note: str = ""

    def verdict(self) -> Verdict:
        if any(condition.verdict() is not Verdict.HELD for condition in self.conditions):
            return Verdict.CANNOT_BE_TOLD
        verdicts = {check.verdict() for check in self.checks}
        if Verdict.DID_NOT_HOLD in verdicts:
            return Verdict.DID_NOT_HOLD
        return Verdict.HELD if verdicts == {Verdict.HELD} else Verdict.CANNOT_BE_TOLD

    def as_json(self) -> dict[str, Any]:
        """Plain values; a bound that is infinite is null."""
        return {
            "statement": self.statement,
            "section": self.section,
            "verdict": str(self.verdict()),
            "conditions": [_check_json(check) for check in self.conditions],
            "checks": [_check_json(check) for check in self.checks],
            "note": self.note,
        }


class Range(TypedDict):
    """Both bounds of a check."""

    low: float
    high: float


def within(tolerance: float) -> Range:
    """The range of "about as much as": no further than `tolerance` from 0, an absolute figure stated in the check."""
    return Range(low=-tolerance, high=tolerance)


def _check_json(check: Check) -> dict[str, Any]:
    return {
        "what": check.what,
        "verdict": str(check.verdict()),
        "range": check.range_text(),
        "found": _estimate_json(check.estimate),
        "start": _estimate_json(check.start),
    }


def _estimate_json(estimate: Estimate | None) -> dict[str, float | None] | None:
    if estimate is None:
        return None
    values = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
