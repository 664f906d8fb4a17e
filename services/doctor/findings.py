"""What a check found: how it stands, in one line, and what to do about it."""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    """Works, and will cost something."""
    FAIL = "fail"
    """Does not work, or loses requests."""
    SKIPPED = "skipped"
    """Could not be looked at, for the reason given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Example: `Finding(check="redis memory", verdict=Verdict.FAIL, message="policy allkeys-lru", mend="run ...")`."""

    check: str
    verdict: Verdict
    message: str
    mend: str = ""
    """What to do; empty where nothing is to be done."""


def ok(check: str, message: str) -> Finding:
    return Finding(check=check, verdict=Verdict.OK, message=message)


def warn(check: str, message: str, mend: str) -> Finding:
    return Finding(check=check, verdict=Verdict.WARN, message=message, mend=mend)


def fail(check: str, message: str, mend: str) -> Finding:
    return Finding(check=check, verdict=Verdict.FAIL, message=message, mend=mend)


def skipped(check: str, message: str) -> Finding:
    return Finding(check=check, verdict=Verdict.SKIPPED, message=message)


def exit_code(findings: list[Finding]) -> int:
    """1 when anything fails; warnings alone are 0."""
    return int(any(finding.verdict is Verdict.FAIL for finding in findings))
