"""Reading solutions back: their style, the steps that needed a carry and the carries that were forgotten.

Works on sampled text, so it takes what it recognises and never fails: a response in neither style has style None and
no steps. Only the step's own equations are read, not the problem, so a chain that went wrong earlier is read as it
stands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from testbed import wording
from testbed.wording import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a response shows; num_carries and num_forgotten count steps."""

    style: str | None
    num_steps: int
    num_carries: int
    num_forgotten: int


def _any(table: Table) -> str:
    return "(?:" + "|".join(re.escape(form) for form in sorted(table, key=len, reverse=True)) + ")"


_EQUALS, _SEPARATOR, _RESULT = _any(wording.EQUALS), _any(wording.SEPARATORS), _any(wording.RESULTS)
_HEAD = rf"(?P<operand>[+-]\d\d){_any(wording.HEAD_ENDS)}"
_MARKS = {**wording.CARRIES, **wording.BORROWS}
_COLUMNS_STEP = re.compile(
    rf"{_HEAD}(?P<left>\d\d?)[+-]\d{_EQUALS}(?P<ones>\d\d?)(?P<mark>{_any(_MARKS)})?{_SEPARATOR}"
    rf"\d\d?[+-]\d\d?(?:[+-]1)?{_EQUALS}\d\d?{_RESULT}\d+"
)
_ROUNDING_STEP = re.compile(
    rf"{_HEAD}\d\d{_any(wording.NEAR)}(?P<near>\d+){_SEPARATOR}(?P<total>\d+)[+-]\d+{_EQUALS}\d+"
    rf"(?P<correction>{_any({**wording.LESS, **wording.MORE})}\d)?{_RESULT}\d+"
)


def style_of(text: str) -> str | None:
    """The style that the opening announces, after a tag if there is one."""
    for style, openings in wording.OPENINGS.items():
        if any(text.startswith(opening) or f"] {opening}" in text for opening in openings):
            return style
    return None


def _columns(text: str) -> Reading:
    steps = list(_COLUMNS_STEP.finditer(text))
    # Only a sum beyond nine, or a minuend that was lent ten, needs a mark.
    carries = [step for step in steps if len(step["ones" if step["operand"][0] == "+" else "left"]) == 2]
    forgotten = sum(step["mark"] is None for step in carries)
    return Reading(style="columns", num_steps=len(steps), num_carries=len(carries), num_forgotten=forgotten)


def _rounding(text: str) -> Reading:
    steps = list(_ROUNDING_STEP.finditer(text))
    carries = [step for step in steps if _needs_carry(int(step["total"]), int(step["operand"]))]
    forgotten = sum(step["correction"] is None for step in carries)
    return Reading(style="rounding", num_steps=len(steps), num_carries=len(carries), num_forgotten=forgotten)


def _needs_carry(total: int, operand: int) -> bool:
    ones = abs(operand) % 10
    return total % 10 + ones >= 10 if operand > 0 else total % 10 < ones


def read(text: str) -> Reading:
    """Read a response in the style it announces."""
    style = style_of(text)
    if style is None:
        return Reading(style=None, num_steps=0, num_carries=0, num_forgotten=0)
    return _columns(text) if style == "columns" else _rounding(text)
