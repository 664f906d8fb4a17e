"""The yardstick of `step_pipeline`, against schedules worked out by hand."""

from benchmarks.pipeline_ideal import (
    RolloutLoad,
    elsewhere_steps,
    end_times,
    sequential_steps,
    streaming_steps,
)

# Two rollouts that end at 1 and 2 s. The teacher is done with them at 2 and 3 s, training takes 0.5 s each.
LOAD = [RolloutLoad(ends=1.0, scoring=1.0, training=0.5), RolloutLoad(ends=2.0, scoring=1.0, training=0.5)]


def test_a_free_slot_takes_the_next_response() -> None:
    assert end_times([4, 1, 2, 3], slots=2, step_s=0.5) == [2.0, 0.5, 1.5, 3.0]


def test_without_streaming_training_begins_with_the_last_score() -> None:
    assert sequential_steps([LOAD]) == [4.0]


def test_streaming_trains_the_first_while_the_second_is_scored() -> None:
    assert streaming_steps([LOAD]) == [3.5]
    assert streaming_steps([LOAD, LOAD]) == [3.5, 3.5]


def test_with_a_lag_scores_come_while_the_next_step_is_sampled() -> None:
    # Sampled until 4 s, trained until 5; then 6 to 7 s is sampled, and so on: nothing is ever waited for.
    assert streaming_steps([LOAD, LOAD, LOAD], lag=1) == [5.0, 3.0, 1.0]


def test_a_sampler_elsewhere_is_trained_beside() -> None:
    assert elsewhere_steps([LOAD]) == [3.5]
    fast = [RolloutLoad(ends=1.0, scoring=0.1, training=0.5), RolloutLoad(ends=2.0, scoring=0.1, training=0.1)]
    assert elsewhere_steps([fast]) == [2.2]
