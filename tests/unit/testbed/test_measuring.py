"""What a card's numbers are made of."""

import pytest

from testbed.datasets import Item
from testbed.measuring import Graded, summarize
from testbed.sampling import Response

GOOD = "Digits first\n+38: 7+8=15 carry; 4+3+1=8 so 85\nAnswer: 85"
FORGOT = "Ones first Now +38: 7+8=15, 4+3=7 -> 75\nAnswer: 75"
ROUNDED = "To tens\n+38: 38 near 40; 47+40=87 less 2 so 85\n\\boxed{85}"


def graded(text: str, level: str, is_correct: bool, template: str = "dapo", truncated: bool = False) -> Graded:
    return Graded(
        item=Item(question="What is 47+38?", answer="85", level=level),
        template=template,
        response=Response(
            text=text, num_tokens=2, truncated=truncated, entropies=(0.0, 1.0), num_live=(1, 9 if is_correct else 3)
        ),
        is_correct=is_correct,
    )


def test_shares_and_rates_by_hand() -> None:
    summary = summarize(
        [
            graded(GOOD, "1", True),
            graded(FORGOT, "1", False),
            graded(ROUNDED, "2", True, "boxed"),
            graded("nothing", "2", False, "boxed", truncated=True),
        ]
    )
    assert summary.num_samples == 4
    assert summary.accuracy == 0.5
    assert summary.accuracy_by_level == {"1": 0.5, "2": 0.5}
    assert summary.accuracy_by_template == {"boxed": 0.5, "dapo": 0.5}
    assert summary.truncated_share == 0.25
    assert summary.mean_response_tokens == 2
    assert summary.mean_entropy_nats == 0.5
    assert summary.max_live_tokens == 9
    assert summary.mean_live_tokens_at_forks == 6
    assert summary.wide_fork_share == 0.25
    assert summary.style_shares == {"columns": 0.5, "none": 0.25, "rounding": 0.25}
    assert summary.forgotten_carry_rate == pytest.approx(1 / 3, abs=1e-4)


def test_rates_without_a_case_are_absent() -> None:
    assert summarize([graded("nothing", "1", False)]).forgotten_carry_rate is None
