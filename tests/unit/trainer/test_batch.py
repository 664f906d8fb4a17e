"""Packing and splitting of scored rollouts."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.errors import InternalError
from opd.types import FinishReason, Rollout, Scores
from services.trainer.batch import ScoredRollout, build_batch, micro_batches


def scored(name: str, prompt: list[int], response: list[int], k: int = 2) -> ScoredRollout:
    """Every number tells where it belongs: response token i of rollout `name` carries 10 * i plus its column."""
    num = len(response)
    table = np.arange(num, dtype=np.float32)[:, None] * 10 + np.arange(k, dtype=np.float32)
    ids = (np.arange(num)[:, None] + np.arange(k)).astype(np.int32)
    rollout = Rollout(
        rollout_id=name,
        group=0,
        prompt_token_ids=np.array(prompt, np.int32),
        response_token_ids=np.array(response, np.int32),
        finish_reason=FinishReason.STOP,
        rollout_logprobs=-table[:, 0] - 1,
        topk_token_ids=ids,
        topk_logprobs=-table - 2,
        sampled_logprobs=-table[:, 0] - 3,
        entropy=table[:, 0] + 4,
        policy_version=0,
    )
    scores = Scores(
        sampled_logprobs=-table[:, 0] - 5,
        candidate_logprobs=-table - 6,
        topk_token_ids=ids + 1,
        topk_logprobs=-table - 7,
        entropy=table[:, 0] + 8,
    )
    return ScoredRollout(rollout=rollout, scores=scores)


def test_tokens_and_positions_lie_one_after_the_other() -> None:
    batch = build_batch([scored("a", [5, 6, 7], [8, 9]), scored("b", [3], [4])])
    assert batch.tokens.input_ids_N.tolist() == [5, 6, 7, 8, 9, 3, 4]
    assert batch.tokens.position_ids_N.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.tokens.lengths == (5, 2)
    assert batch.sampled_ids_T.tolist() == [8, 9, 4]
    assert batch.rollout_index_T.tolist() == [0, 0, 1]
    assert batch.position_T.tolist() == [0, 1, 0]
    assert (batch.num_rollouts, batch.num_positions) == (2, 3)


def test_each_position_points_at_the_token_before_it() -> None:
    batch = build_batch([scored("a", [5, 6, 7], [8, 9]), scored("b", [3], [4])])
    before = batch.tokens.input_ids_N[batch.tokens.hidden_index_T]
    assert before.tolist() == [7, 8, 3]
    assert torch.equal(batch.tokens.response_ids_T, batch.sampled_ids_T)


def test_every_column_keeps_its_rows() -> None:
    batch = build_batch([scored("a", [5], [8, 9]), scored("b", [3], [4])])
    steps = torch.tensor([0.0, 10.0, 0.0])
    assert torch.equal(batch.rollout_logprobs_T, -steps - 1)
    assert torch.equal(batch.student_support_logprobs_TK, -torch.stack([steps, steps + 1], 1) - 2)
    assert torch.equal(batch.student_sampled_logprobs_T, -steps - 3)
    assert torch.equal(batch.student_entropy_T, steps + 4)
    assert torch.equal(batch.teacher_sampled_logprobs_T, -steps - 5)
    assert torch.equal(batch.teacher_support_logprobs_TK, -torch.stack([steps, steps + 1], 1) - 6)
    assert torch.equal(batch.teacher_topk_logprobs_Tk, -torch.stack([steps, steps + 1], 1) - 7)
    assert torch.equal(batch.teacher_entropy_T, steps + 8)
    assert batch.support_ids_TK.tolist() == [[0, 1], [1, 2], [0, 1]]
    assert batch.teacher_topk_ids_Tk.tolist() == [[1, 2], [2, 3], [1, 2]]


@pytest.mark.parametrize("name", ["entropy", "sampled_logprobs", "candidate_logprobs", "topk_logprobs"])
def test_what_one_of_the_teachers_does_not_say_is_left_out(name: str) -> None:
    """Several teachers need not say the same; what is not there for all is never 0 for some."""
    item = scored("a", [5], [8, 9])
    silent = dataclasses.replace(item, scores=dataclasses.replace(item.scores, **{name: None}))
    fields = {
        "entropy": "teacher_entropy_T",
        "sampled_logprobs": "teacher_sampled_logprobs_T",
        "candidate_logprobs": "teacher_support_logprobs_TK",
        "topk_logprobs": "teacher_topk_logprobs_Tk",
    }
    found = build_batch([item, silent])
    assert [field for field in fields.values() if getattr(found, field) is None] == [fields[name]]


def test_a_score_of_another_length_is_named() -> None:
    item = scored("a", [5], [8, 9])
    short = dataclasses.replace(item, scores=dataclasses.replace(item.scores, topk_logprobs=np.zeros((1, 2))))
    with pytest.raises(InternalError, match=r"^rollout a: 1 rows for 2 response tokens$"):
        build_batch([short])


def test_the_horizon_and_verified_answers_say_which_positions_train() -> None:
    item = scored("a", [5], [8, 9, 7])
    front = dataclasses.replace(item, supervised_tokens=2)
    both = dataclasses.replace(front, advantage=-0.5)
    short = dataclasses.replace(scored("b", [5], [8]), supervised_tokens=2)
    found = build_batch([front, short])
    assert found.supervised_T.tolist() == found.valid_T.tolist() == [True, True, False, True]
    assert found.num_trained_T.tolist() == [2, 2, 2, 1] and found.advantage_T is None
    found = build_batch([both])
    assert found.supervised_T.tolist() == [True, True, False] and found.valid_T.all()
    assert found.advantage_T.tolist() == [-0.5] * 3
    assert [part.num_trained_tokens for part in (item, front, both, short)] == [3, 2, 3, 1]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=12),
    max_tokens=st.integers(1, 120),
    shuffle=st.randoms(use_true_random=False),
)
def test_micro_batches_hold_everything_once_within_the_budget(
    lengths: list[tuple[int, int]], max_tokens: int, shuffle: object
) -> None:
    items = [scored(f"r{index}", [index] * prompt, [3] * response) for index, (prompt, response) in enumerate(lengths)]
    parts = micro_batches(items, max_tokens)
    names = [[item.rollout.rollout_id for item in part] for part in parts]
    assert sorted(name for part in names for name in part) == sorted(item.rollout.rollout_id for item in items)
    for part in parts:
        assert sum(item.num_tokens for item in part) <= max_tokens or len(part) == 1
    # Each part was opened for want of room in all before it.
    for first, second in itertools.combinations(parts, 2):
        assert sum(item.num_tokens for item in first) + second[0].num_tokens > max_tokens
    reordered = list(items)
    shuffle.shuffle(reordered)  # type: ignore[attr-defined]
    again = [[item.rollout.rollout_id for item in part] for part in micro_batches(reordered, max_tokens)]
    assert again == names
