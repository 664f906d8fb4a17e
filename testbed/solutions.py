"""Step-by-step solutions in two styles, with or without the systematic fault.

Style ``columns`` works on digits from the right; style ``rounding`` rounds the operand and corrects afterwards. The
fault is the forgotten carry: at a step that needs a carry or borrow, the mark after the ones digits (columns) or the
correction (rounding) is left out, and the chain goes on consistently from the wrong total. The step is wrong nowhere
else: every other equation holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from testbed import wording
from testbed.problems import Problem, is_carry
from testbed.wording import pick

STYLES = ("columns", "rounding")
FORGET_RATE = 0.34
MAX_TRIES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """A written solution: num_carries steps needed a carry and num_forgotten of them went without."""

    text: str
    style: str
    result: int
    num_carries: int
    num_forgotten: int


def _sum(random: Random, left: int, right: int) -> str:
    """An addition in either order with its value; the order is one of the forks."""
    first, second = (left, right) if random.random() < 0.6 else (right, left)
    return f"{first}+{second}{pick(random, wording.EQUALS)}{left + right}"


def _columns_step(random: Random, total: int, operand: int, forget: bool) -> tuple[str, int]:
    tens, ones = divmod(total, 10)
    step_tens, step_ones = divmod(abs(operand), 10)
    carry = is_carry(total, operand)
    marked = carry and not forget
    if operand > 0:
        text = _sum(random, ones, step_ones)
        mark, ones = wording.CARRIES, (ones + step_ones) % 10
        left, new_tens = f"{tens}+{step_tens}" + ("+1" if marked else ""), tens + step_tens + marked
    else:
        lent = ones + 10 if carry else ones
        text = f"{lent}-{step_ones}{pick(random, wording.EQUALS)}{lent - step_ones}"
        mark, ones = wording.BORROWS, lent - step_ones
        left, new_tens = f"{tens}-{step_tens}" + ("-1" if marked else ""), tens - step_tens - marked
    text += pick(random, mark) if marked else ""
    text += pick(random, wording.SEPARATORS) + left + pick(random, wording.EQUALS) + str(new_tens)
    return text, 10 * new_tens + ones


def _rounding_step(random: Random, total: int, operand: int, forget: bool) -> tuple[str, int]:
    size = abs(operand)
    near = (size + 5) // 10 * 10
    passed = total + near if operand > 0 else total - near
    correction = total + operand - passed
    sign = "+" if operand > 0 else "-"
    text = f"{size}{pick(random, wording.NEAR)}{near}{pick(random, wording.SEPARATORS)}"
    text += f"{total}{sign}{near}{pick(random, wording.EQUALS)}{passed}"
    if forget:
        return text, passed
    words = wording.MORE if correction > 0 else wording.LESS
    return text + pick(random, words) + str(abs(correction)), total + operand


def _write(random: Random, problem: Problem, style: str, forgotten: tuple[bool, ...]) -> tuple[str, int]:
    step = _columns_step if style == "columns" else _rounding_step
    total, parts = problem.start, [pick(random, wording.OPENINGS[style])]
    for operand, forget in zip(problem.operands, forgotten, strict=True):
        head = f"{operand:+d}" + pick(random, wording.HEAD_ENDS)
        text, total = step(random, total, operand, forget)
        parts += [pick(random, wording.CONNECTIVES), head, text, pick(random, wording.RESULTS), str(total)]
    return "".join(parts), total


def _choose_faults(random: Random, problem: Problem, style: str, rate: float) -> tuple[tuple[bool, ...], int]:
    """Which steps forget, and how many steps of the chain as it then runs needed a carry.

    In style columns a forgotten carry leaves the ones digit right, so later carries stay where they were. Chains that
    would fall below ten are drawn again, because no step form has negative numbers.
    """
    for _ in range(MAX_TRIES):
        total, faults, num_carries = problem.start, [], 0
        lowest = total
        for operand in problem.operands:
            carry = is_carry(total, operand)
            forget = carry and random.random() < rate
            total = _after(style, total, operand, forget)
            lowest = min(lowest, total, total - 5)
            num_carries += carry
            faults.append(forget)
        if lowest >= 0:
            return tuple(faults), num_carries
    return tuple(False for _ in problem.operands), sum(_carries(problem))


def _after(style: str, total: int, operand: int, forget: bool) -> int:
    if not forget:
        return total + operand
    if style == "columns":
        return total + operand + (-10 if operand > 0 else 10)
    near = (abs(operand) + 5) // 10 * 10
    return total + near if operand > 0 else total - near


def _carries(problem: Problem) -> list[bool]:
    total, carries = problem.start, []
    for operand in problem.operands:
        carries.append(is_carry(total, operand))
        total += operand
    return carries


def solve(random: Random, problem: Problem, template: str, style: str, forget_rate: float) -> Solution:
    """Write a solution that ends in the template's answer form; forget_rate 0 writes a correct one."""
    forgotten, num_carries = _choose_faults(random, problem, style, forget_rate)
    text, total = _write(random, problem, style, forgotten)
    text += pick(random, wording.ENDINGS[template]).format(total)
    return Solution(text=text, style=style, result=total, num_carries=num_carries, num_forgotten=sum(forgotten))
