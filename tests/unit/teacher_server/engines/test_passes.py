import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.teacher_server.engines.passes import (
    PassLimits,
    num_passes_at_once,
    pad_right,
    plan_passes,
    plan_rectangles,
)
from tests.unit.teacher_server.tiny_teachers import make_request


def test_similar_lengths_share_a_rectangle_and_the_longest_come_first() -> None:
    assert plan_rectangles([10, 100, 11, 99], 250, 0.25) == [[1, 3], [2, 0]]


def test_a_sequence_over_the_budget_has_a_rectangle_of_its_own() -> None:
    assert plan_rectangles([500, 20, 20], 100, 0.5) == [[0], [1, 2]]


def test_nothing_is_planned_for_nothing() -> None:
    assert plan_rectangles([], 100, 0.5) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 900), st.floats(0.0, 0.9))
def test_every_sequence_is_planned_once_within_both_bounds(lengths: list[int], budget: int, share: float) -> None:
    plan = plan_rectangles(lengths, budget, share)
    assert sorted(index for part in plan for index in part) == list(range(len(lengths)))
    for part in plan:
        area = max(lengths[index] for index in part) * len(part)
        padding = area - sum(lengths[index] for index in part)
        assert len(part) == 1 or (area <= budget and padding <= share * area)


def test_a_long_tailed_mix_pads_at_most_a_tenth() -> None:
    """Lengths as reasoning models write them: log-normal, cut off at the limit, a batch of sixteen thousand tokens."""
    generator = np.random.default_rng(0)
    padding = computed = 0
    for _ in range(50):
        lengths = 64 + np.minimum(np.exp(generator.normal(5.5, 0.9, 32)), 3_000).astype(int)
        for part in plan_rectangles(lengths.tolist(), 16_384, 0.1):
            area = max(lengths[part]) * len(part)
            computed, padding = computed + area, padding + area - sum(lengths[part])
    assert padding <= 0.1 * computed


def test_padding_repeats_the_sequences_own_first_id() -> None:
    padded = pad_right([np.array([7, 8], np.int32), np.array([1, 2, 3, 4], np.int32)])
    assert padded.tolist() == [[7, 8, 7, 7], [1, 2, 3, 4]]


def test_a_sequence_of_nothing_is_all_padding() -> None:
    assert pad_right([np.array([], np.int32), np.array([5], np.int32)]).tolist() == [[0], [5]]
    assert pad_right([np.array([], np.int32)]).shape == (1, 0)


@pytest.mark.parametrize(
    ("lengths", "num_threads", "expected"),
    [
        ([512] * 16, 2, 2),
        ([512] * 4, 2, 2),
        ([512] * 3, 2, 1),
        ([2048] + [64] * 8, 2, 1),
        ([40] * 12, 2, 1),
        ([512] * 16, 1, 1),
        ([512] * 16, 15, 1),
        ([], 2, 1),
    ],
)
def test_passes_run_side_by_side_where_every_thread_has_its_share(
    lengths: list[int], num_threads: int, expected: int
) -> None:
    assert num_passes_at_once(lengths, num_threads) == expected


def test_side_by_side_there_are_more_and_smaller_passes() -> None:
    requests = [make_request(seed, num_prompt=8, num_response=56) for seed in range(16)]
    plans = [
        plan_passes(
            requests,
            PassLimits(max_tokens=4096, max_padding_share=0.1, min_saved_tokens=64, num_workers=num_workers),
            lambda _: False,
        )
        for num_workers in (1, 2)
    ]
    assert [len(plan.rectangles) for plan in plans] == [1, 8]
    assert sorted(index for part in plans[1].rectangles for index in part) == list(range(16))
