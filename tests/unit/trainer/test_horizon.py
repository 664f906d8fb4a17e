"""The horizon's rule, and what it is measured by."""

import dataclasses

import numpy as np
import pytest

from services.trainer.batch import ScoredRollout
from services.trainer.horizon import LENGTH, RELIABILITY, Horizon, next_horizon, reliability_at
from services.trainer.objectives.config import HorizonConfig
from tests.unit.trainer.test_batch import scored

CONFIG = HorizonConfig(start=16, growth=1.5, reliable_at=0.9, unreliable_below=0.6, min_positions=4)


@pytest.mark.parametrize(
    ("length", "reliability", "expected"),
    [
        (16, 0.95, 24),
        (16, 0.9, 24),
        (24, 0.75, 24),
        (36, 0.59, 24),
        (20, 0.1, 16),
        (16, 0.0, 16),
        (90, 1.2, 100),
        (40, None, 40),
        (1, 0.95, 2),
        (8, 0.1, 8),
    ],
)
def test_the_rule(length: int, reliability: float | None, expected: int) -> None:
    assert next_horizon(length, reliability, CONFIG, longest=100) == expected


def test_a_growth_of_one_is_a_fixed_horizon() -> None:
    fixed = CONFIG.model_copy(update={"growth": 1.0})
    assert [next_horizon(16, share, fixed, longest=100) for share in (0.0, 0.7, 1.0)] == [16, 16, 16]


def agreeing(name: str, num_positions: int, num_agreed: list[int]) -> ScoredRollout:
    """At each position the teacher's first ids are the student's own, the others are not."""
    item = scored(name, [5], [7] * num_positions, k=4)
    teacher = item.rollout.topk_token_ids + 100
    for position, count in enumerate(num_agreed):
        teacher[position, :count] = item.rollout.topk_token_ids[position, :count]
    return dataclasses.replace(item, scores=dataclasses.replace(item.scores, topk_token_ids=teacher))


def test_reliability_is_the_overlap_at_the_end_over_that_at_the_beginning() -> None:
    items = [agreeing("a", 8, [4, 4, 3, 3, 2, 2, 1, 3]), agreeing("b", 7, [4, 2, 0, 0, 0, 0, 2])]
    front, back = (4 + 4 + 4 + 2) / 4, (1 + 3 + 2) / 3
    assert reliability_at(items, 8, min_positions=3) == pytest.approx(back / front)
    assert reliability_at(items, 8, min_positions=4) is None, "too few responses are that long"
    assert reliability_at(items, 40, min_positions=1) is None
    assert reliability_at([agreeing("c", 8, [0] * 8)], 8, min_positions=1) is None


def test_without_the_teachers_top_k_nothing_is_judged() -> None:
    item = agreeing("a", 8, [4] * 8)
    silent = dataclasses.replace(item, scores=dataclasses.replace(item.scores, topk_token_ids=None, topk_logprobs=None))
    assert reliability_at([silent], 8, min_positions=1) is None


def test_it_grows_while_the_teacher_is_reliable_and_goes_on_where_a_run_was_left() -> None:
    horizon, records = Horizon(CONFIG, longest=60), []
    for good_until in (16, 24, 30, 60, 60):
        items = [agreeing(name, 60, [4 * (position < good_until) for position in range(60)]) for name in ("a", "b")]
        metrics = horizon.observe(items)
        records.append({name: mean.value for name, mean in metrics.items()})
        assert Horizon(CONFIG, longest=60, records=records).length == horizon.length
    # At 36 the last quarter, from 27 on, holds a third of good positions: back to 24.
    assert [record[LENGTH] for record in records] == [16, 24, 36, 24, 36]
    assert [round(record[RELIABILITY], 2) for record in records] == [1.0, 1.0, 0.33, 1.0, 1.0]
    assert horizon.length == 54


def test_it_starts_no_longer_than_responses_can_be_and_old_records_count_for_nothing() -> None:
    assert Horizon(CONFIG, longest=8).length == 8
    assert Horizon(CONFIG, longest=100, records=[{"loss/objective": 1.0}]).length == 16
    assert np.isclose(Horizon(CONFIG, longest=100, records=[{LENGTH: 24.0}]).length, 24)


def test_an_alarm_halves_what_it_was_raised_at_and_the_shortest_of_several_counts() -> None:
    lengths = []
    for alarmed in ([], [24.0], [12.0, 24.0], [8.0, 8.0], [1.0]):
        horizon = Horizon(CONFIG, longest=100)
        horizon.shorten([{LENGTH: length} for length in alarmed])
        lengths.append(horizon.length)
    assert lengths == [16, 12, 6, 4, 1]
    horizon.observe([agreeing(name, 20, [4] * 20) for name in ("a", "b", "c", "d")])
    assert horizon.length == 2
