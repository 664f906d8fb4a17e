import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.teacher_server.engines.sub_batches import pad_right, plan_sub_batches


def test_similar_lengths_share_a_rectangle_and_the_longest_come_first() -> None:
    assert plan_sub_batches([10, 100, 11, 99], 250, 0.25) == [[1, 3], [2, 0]]


def test_a_sequence_over_the_budget_has_a_rectangle_of_its_own() -> None:
    assert plan_sub_batches([500, 20, 20], 100, 0.5) == [[0], [1, 2]]


def test_nothing_is_planned_for_nothing() -> None:
    assert plan_sub_batches([], 100, 0.5) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 900), st.floats(0.0, 0.9))
def test_every_sequence_is_planned_once_within_both_bounds(lengths: list[int], budget: int, share: float) -> None:
    plan = plan_sub_batches(lengths, budget, share)
    assert sorted(index for part in plan for index in part) == list(range(len(lengths)))
    for part in plan:
        area = max(lengths[index] for index in part) * len(part)
        padding = area - sum(lengths[index] for index in part)
        assert len(part) == 1 or (area <= budget and padding <= share * area)


def test_padding_repeats_the_sequences_own_first_id() -> None:
    padded = pad_right([np.array([7, 8], np.int32), np.array([1, 2, 3, 4], np.int32)])
    assert padded.tolist() == [[7, 8, 7, 7], [1, 2, 3, 4]]
