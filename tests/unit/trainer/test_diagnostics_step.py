"""A step's numbers from whole rollouts: means over the right things, any order, absent when not measured."""

import math
import random
from typing import Any

import numpy as np
import pytest

from opd.errors import NonFiniteError
from opd.types import FinishReason, Rollout, Scores
from services.trainer.diagnostics import (
    POSITION_EDGES,
    Mean,
    PositionScores,
    StepDiagnostics,
    position_metrics,
    positions_of,
)

NUM_IDS, K = 11, 4


def _top(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logprobs, axis=-1, kind="stable")[:, :K]
    return logprobs, ids.astype(np.int32), np.take_along_axis(logprobs, ids, -1).astype(np.float32)


def _scored(index: int, length: int, finish: FinishReason = FinishReason.STOP) -> tuple[Rollout, Scores]:
    generator = np.random.default_rng(index)
    student, student_ids, student_topk = _top(generator.normal(size=(length, NUM_IDS)) * 2)
    teacher, teacher_ids, teacher_topk = _top(generator.normal(size=(length, NUM_IDS)) * 2)
    sampled = generator.integers(0, NUM_IDS, length).astype(np.int32)
    rows = np.arange(length)
    rollout = Rollout(
        rollout_id=f"run.0.{index}",
        group=0,
        prompt_token_ids=np.array([1], np.int32),
        response_token_ids=sampled,
        finish_reason=finish,
        rollout_logprobs=student[rows, sampled].astype(np.float32),
        topk_token_ids=student_ids,
        topk_logprobs=student_topk,
        sampled_logprobs=student[rows, sampled].astype(np.float32),
        entropy=np.float32(-(np.exp(student) * student).sum(-1)),
        policy_version=0,
    )
    scores = Scores(
        sampled_logprobs=teacher[rows, sampled].astype(np.float32),
        candidate_logprobs=np.take_along_axis(teacher, student_ids.astype(np.int64), -1).astype(np.float32),
        topk_token_ids=teacher_ids,
        topk_logprobs=teacher_topk,
        entropy=np.float32(-(np.exp(teacher) * teacher).sum(-1)),
    )
    return rollout, scores


def _with(record: Any, **changes: Any) -> Any:
    fields = {name: getattr(record, name) for name in type(record).__slots__}
    return type(record)(**{**fields, **changes})


LENGTHS = [1, 40, 3, 20, 300]
JUDGED = [True, False, None, False, True]


def _step(order: list[int]) -> StepDiagnostics:
    step = StepDiagnostics()
    for index in order:
        finish = FinishReason.LENGTH if LENGTHS[index] == 300 else FinishReason.STOP
        step.add_rollout(*_scored(index, LENGTHS[index], finish), is_correct=JUDGED[index])
    return step


def test_position_means_are_over_positions_and_rollout_means_over_rollouts() -> None:
    values = _step(list(range(5))).summary().values
    columns: dict[str, list[float]] = {}
    rewards = []
    for index, length in enumerate(LENGTHS):
        rollout, scores = _scored(index, length)
        for name, array in position_metrics(positions_of(rollout, scores)).items():
            columns.setdefault(name, []).extend(array[~np.isnan(array)])
        gaps = scores.sampled_logprobs.astype(np.float64) - rollout.sampled_logprobs
        rewards.append(sum(gaps) / length)
    for name, column in columns.items():
        assert values[name] == pytest.approx(math.fsum(column) / len(column), rel=1e-12), name
    assert len(columns["distill/overlap_ratio"]) == sum(LENGTHS)
    assert len(columns["distill/overlap_advantage"]) < sum(LENGTHS), "some positions must share nothing"
    assert values["rollout/response_length"] == sum(LENGTHS) / 5
    assert values["rollout/truncated_fraction"] == 1 / 5
    assert values["rollout/teacher_reward"] == pytest.approx(sum(rewards) / 5, rel=1e-12)
    assert values["outcome/accuracy"] == 2 / 4
    wins = [a > b for a in (rewards[0], rewards[4]) for b in (rewards[1], rewards[3])]
    assert values["outcome/auroc"] == sum(wins) / 4


def test_the_order_of_arrival_changes_no_bit() -> None:
    expected = _step(list(range(5))).summary()
    for seed in range(5):
        order = list(range(5))
        random.Random(seed).shuffle(order)
        assert _step(order).summary() == expected


def test_positions_packed_over_rollouts_give_the_same_as_one_by_one() -> None:
    parts = [positions_of(*_scored(index, length)) for index, length in enumerate(LENGTHS)]
    packed = PositionScores(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in PositionScores.__slots__}
    )
    step = StepDiagnostics()
    step.add_positions(packed)
    found, expected = step.summary(), _step(list(range(5))).summary()
    assert {name: expected.values[name] for name in found.values} == pytest.approx(found.values, rel=1e-12)
    np.testing.assert_array_equal(
        found.arrays["distill/overlap_ratio/by_position/count"],
        expected.arrays["distill/overlap_ratio/by_position/count"],
    )


def test_buckets_have_fixed_edges_their_own_counts_and_no_number_when_empty() -> None:
    arrays = _step(list(range(5))).summary().arrays
    assert arrays["distill/position_edges"] == list(POSITION_EDGES)
    counts = arrays["distill/entropy_gap/by_position/count"]
    # 1, 40, 3, 20 and 300 positions in [0,16) [16,32) [32,64) [64,128) [128,256) [256,512).
    assert counts == [1 + 16 + 3 + 16 + 16, 16 + 4 + 16, 8 + 32, 64, 128, 44, *[0] * 7]
    means = arrays["distill/entropy_gap/by_position"]
    assert [math.isnan(mean) for mean in means] == [count == 0 for count in counts]
    rollout, scores = _scored(4, 300)
    gaps = np.abs(scores.entropy.astype(np.float64) - rollout.entropy.astype(np.float64))
    assert means[5] == pytest.approx(gaps[256:].mean(), rel=1e-12)
    advantage_counts = arrays["distill/overlap_advantage/by_position/count"]
    assert sum(advantage_counts) < sum(counts)


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"entropy": None}, {"distill/entropy_teacher", "distill/entropy_gap"}),
        ({"entropy": np.full(20, np.nan, np.float32)}, {"distill/entropy_teacher", "distill/entropy_gap"}),
        ({"candidate_logprobs": None}, {"distill/extreme_prob_gap", "distill/extreme_prob_gap_abs", "loss/reverse_kl"}),
        (
            {"sampled_logprobs": None},
            {
                *("rollout/sampled_reverse_kl", "rollout/teacher_reward"),
                *("rollout/eos_logprob_student", "rollout/eos_logprob_teacher"),
            },
        ),
        (
            {"topk_token_ids": None, "topk_logprobs": None},
            {
                "distill/overlap_ratio",
                "distill/overlap_advantage",
                "distill/overlap_advantage_sum",
                "distill/empty_overlap_fraction",
                "distill/overlap_mass_student",
                "distill/overlap_mass_teacher",
                "distill/mass99_overlap",
                "distill/uniform_teacher_fraction",
            },
        ),
    ],
)
def test_what_the_teacher_did_not_say_is_absent(change: dict[str, Any], absent: set[str]) -> None:
    rollout, scores = _scored(3, 20)
    full, partial = StepDiagnostics(), StepDiagnostics()
    full.add_rollout(rollout, scores)
    partial.add_rollout(rollout, _with(scores, **change))
    assert set(full.summary().values) - set(partial.summary().values) == absent


def test_a_sampler_without_statistics_leaves_only_the_rollouts_own_numbers() -> None:
    rollout, scores = _scored(3, 20)
    empty = np.full(20, np.nan, np.float32)
    bare = _with(
        rollout,
        entropy=empty,
        sampled_logprobs=empty,
        topk_token_ids=np.zeros((20, 0), np.int32),
        topk_logprobs=np.zeros((20, 0), np.float32),
    )
    step = StepDiagnostics()
    step.add_rollout(bare, scores, is_correct=True)
    assert set(step.summary().values) == {
        "distill/entropy_teacher",
        "distill/uniform_teacher_fraction",
        "rollout/response_length",
        "rollout/truncated_fraction",
        "outcome/accuracy",
    }


def test_a_number_missing_here_and_there_is_a_fault() -> None:
    rollout, scores = _scored(3, 20)
    entropy = scores.entropy.copy()
    entropy[7] = np.nan
    with pytest.raises(NonFiniteError, match=r"rollout run.0.3: teacher entropy at position 7 is nan"):
        StepDiagnostics().add_rollout(rollout, _with(scores, entropy=entropy))


def test_rows_that_were_not_scored_are_left_out() -> None:
    rollout, scores = _scored(3, 20)
    rows = np.arange(20) % 3 == 1
    blank = {
        name: np.where(rows if value.ndim == 1 else rows[:, None], value, -1 if value.dtype == np.int32 else np.nan)
        for name in ("sampled_logprobs", "candidate_logprobs", "topk_token_ids", "topk_logprobs", "entropy")
        for value in [getattr(scores, name)]
    }
    step = StepDiagnostics()
    step.add_rollout(rollout, _with(scores, **blank), scored_rows=rows)
    expected = position_metrics(positions_of(rollout, scores))["distill/overlap_ratio"][rows].mean()
    summary = step.summary()
    assert summary.values["distill/overlap_ratio"] == pytest.approx(expected)
    assert sum(summary.arrays["distill/overlap_ratio/by_position/count"]) == rows.sum()
    assert summary.values["rollout/response_length"] == 20


def test_costly_metrics_can_be_kept_to_a_sample_of_rollouts() -> None:
    step = StepDiagnostics()
    step.add_rollout(*_scored(0, 5), with_costly=False)
    step.add_rollout(*_scored(1, 40))
    found, only = step.summary(), StepDiagnostics()
    only.add_rollout(*_scored(1, 40))
    for name in ("distill/overlap_ratio", "distill/mass99_overlap", "loss/reverse_kl", "distill/extreme_prob_gap"):
        assert found.values[name] == only.summary().values[name]
    assert sum(found.arrays["distill/overlap_ratio/by_position/count"]) == 40
    assert sum(found.arrays["distill/entropy_gap/by_position/count"]) == 45
    assert found.values["rollout/response_length"] == 22.5


def test_the_end_is_judged_only_where_an_eos_was_sampled_and_scored() -> None:
    step = StepDiagnostics()
    ends = [_scored(0, 5), _scored(1, 7)]
    for rollout, scores in ends:
        step.add_rollout(rollout, scores)
    step.add_rollout(*_scored(2, 9, FinishReason.LENGTH))
    front = np.arange(6) < 3
    step.add_rollout(*_scored(3, 6), scored_rows=front)
    values = step.summary().values
    for name, columns in (
        ("student", [rollout.sampled_logprobs for rollout, _ in ends]),
        ("teacher", [scores.sampled_logprobs for _, scores in ends]),
    ):
        expected = sum(float(column[-1]) for column in columns) / 2
        assert values[f"rollout/eos_logprob_{name}"] == pytest.approx(expected, rel=1e-12)


def test_rewards_are_told_apart_by_outcome() -> None:
    values = _step(list(range(5))).summary().values
    gaps = {}
    for index, length in enumerate(LENGTHS):
        rollout, scores = _scored(index, length)
        gaps[index] = (scores.sampled_logprobs.astype(np.float64) - rollout.sampled_logprobs).mean()
    assert values["outcome/teacher_reward_correct"] == pytest.approx((gaps[0] + gaps[4]) / 2, rel=1e-12)
    assert values["outcome/teacher_reward_incorrect"] == pytest.approx((gaps[1] + gaps[3]) / 2, rel=1e-12)
    arrays = _step(list(range(5))).summary().arrays
    assert arrays["outcome/rewards_correct"] == pytest.approx(sorted([gaps[0], gaps[4]]), rel=1e-12)
    assert arrays["outcome/rewards_incorrect"] == pytest.approx(sorted([gaps[1], gaps[3]]), rel=1e-12)


def test_loss_means_join_by_sum_and_count() -> None:
    step = StepDiagnostics()
    step.add_means({"loss/objective": Mean(total=6.0, count=3), "loss/support_size": Mean(total=0.0, count=0)})
    step.add_means({"loss/objective": Mean(total=1.0, count=7)})
    assert step.summary().values == {"loss/objective": 0.7}


def test_a_step_of_nothing_reports_nothing() -> None:
    summary = StepDiagnostics().summary()
    assert summary.values == {} and summary.arrays == {}
