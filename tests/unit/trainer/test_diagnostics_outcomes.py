"""The teacher's reward and how well it tells right from wrong, against counting all pairs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.diagnostics.outcomes import auroc, teacher_reward


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3).map(lambda n: n / 4), st.booleans()), max_size=30),
)
def test_auroc_is_the_share_of_pairs_in_the_right_order(judged: list[tuple[float, bool]]) -> None:
    correct = [reward for reward, is_correct in judged if is_correct]
    incorrect = [reward for reward, is_correct in judged if not is_correct]
    found = auroc([reward for reward, _ in judged], [is_correct for _, is_correct in judged])
    if not correct or not incorrect:
        assert found is None
        return
    wins = sum((a > b) + 0.5 * (a == b) for a in correct for b in incorrect)
    assert found == pytest.approx(wins / (len(correct) * len(incorrect)), abs=1e-12)


def test_auroc_at_its_ends() -> None:
    assert auroc([1.0, 2.0, -1.0], [True, True, False]) == 1.0
    assert auroc([1.0, 2.0, -1.0], [False, False, True]) == 0.0
    assert auroc([0.5, 0.5], [True, False]) == 0.5


def test_the_reward_is_a_mean_over_positions() -> None:
    student, teacher = np.array([-1.0, -2.0, -4.0], np.float32), np.array([-2.0, -1.0, -1.0], np.float32)
    assert teacher_reward(student, teacher) == pytest.approx((-1 + 1 + 3) / 3)
    assert math.isnan(teacher_reward(student[:0], teacher[:0]))
