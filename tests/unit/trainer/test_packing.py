"""How documents are split and grouped: what is promised of padding holds for every distribution of lengths."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.batch import ScoredRollout, micro_batches
from services.trainer.packing import MAX_PADDING, group_bounds, pack, split_by_tokens
from tests.unit.trainer.test_batch import scored

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def lengths_of_the_testbed(generator: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Prompts of 18 to 30 tokens, responses of 12 to 90, as on the arithmetic task."""
    return list(zip(generator.integers(18, 31, count), generator.integers(12, 91, count), strict=True))


def long_tailed_lengths(generator: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Log-normal responses (median 400, one in forty above 2,800), cut at 7,168; prompts of 50 to 200 tokens."""
    responses = np.exp(generator.normal(np.log(400), 1.0, count)).clip(8, 7168).astype(int)
    return list(zip(generator.integers(50, 201, count), responses, strict=True))


def rollouts(lengths: Sequence[tuple[int, int]]) -> list[ScoredRollout]:
    """Of a prompt each."""
    return [scored(f"r{index}", [index] * prompt, [3] * response) for index, (prompt, response) in enumerate(lengths)]


def num_tokens_of(item: ScoredRollout) -> int:
    return item.num_tokens


def name_of(item: ScoredRollout) -> str:
    return item.rollout.rollout_id


@pytest.mark.parametrize("distribution", [lengths_of_the_testbed, long_tailed_lengths])
@pytest.mark.parametrize("max_tokens", [4096, 32768])
def test_at_most_a_tenth_is_padding(distribution: object, max_tokens: int) -> None:
    items = rollouts(distribution(np.random.default_rng(0), 256))  # type: ignore[operator]
    parts = micro_batches(items, max_tokens)
    packed = [pack([item.rollout for item in part]) for part in parts]
    num_tokens = sum(item.num_tokens for item in items)
    # Layers that see one token at a time see no padding at all; attention sees at most a tenth.
    assert sum(len(part.input_ids_N) for part in packed) == num_tokens
    assert all(0.0 <= part.padding_share <= MAX_PADDING for part in packed)
    # Few groups, each of which is one call of attention.
    assert sum(len(part.groups) for part in packed) <= 6 * len(parts)
    # Of full parts but for the last: what is left of a part is filled up with shorter documents.
    assert len(parts) <= num_tokens / max_tokens + 2


def test_a_plain_batch_of_the_same_documents_would_be_padded_by_a_third() -> None:
    items = rollouts(long_tailed_lengths(np.random.default_rng(0), 64))
    tokens = pack([item.rollout for item in split_by_tokens(items, 10**6, size=num_tokens_of, name=name_of)[0]])
    assert 1 - sum(tokens.lengths) / (len(tokens.lengths) * max(tokens.lengths)) > 1 / 3
    assert tokens.padding_share <= MAX_PADDING


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS)
def test_groups_hold_every_document_once_and_are_never_padded_by_more_than_a_tenth(lengths: list[int]) -> None:
    bounds = group_bounds(lengths)
    assert [first for first, _ in bounds] == [0, *[last for _, last in bounds[:-1]]]
    assert bounds[-1][1] == len(lengths)
    for first, last in bounds:
        inside = lengths[first:last]
        assert inside and sum(inside) >= (1 - MAX_PADDING) * len(inside) * max(inside)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=20))
def test_a_group_gives_back_what_it_was_given(lengths: list[tuple[int, int]]) -> None:
    tokens = pack([item.rollout for item in rollouts(lengths)])
    values_N3 = torch.randn(len(tokens.input_ids_N), 3, dtype=torch.float64)
    back = torch.cat([group.packed(group.padded(values_N3)) for group in tokens.groups])
    assert torch.equal(back, values_N3)
    documents = values_N3.split(tokens.lengths)
    start = 0
    for group in tokens.groups:
        for row, document in zip(group.padded(values_N3), documents[start : start + group.num_documents], strict=True):
            assert torch.equal(row[: len(document)], document) and not row[len(document) :].any()
        start += group.num_documents
    assert start == len(documents)


def test_documents_of_one_length_are_one_group_without_a_copy() -> None:
    tokens = pack([item.rollout for item in rollouts([(2, 3), (1, 4), (3, 2)])])
    (group,) = tokens.groups
    assert group.places is None and tokens.padding_share == 0.0
    assert group.padded(tokens.input_ids_N).data_ptr() == tokens.input_ids_N.data_ptr()


def test_a_part_is_filled_up_by_what_fits() -> None:
    sizes = {"a": 6, "b": 5, "c": 5, "d": 4, "e": 30}
    parts = split_by_tokens(list(sizes), 10, size=sizes.__getitem__, name=str)
    assert parts == [["e"], ["a", "d"], ["b", "c"]]


def siblings(prompts: int, each: int, seed: int = 0) -> list[ScoredRollout]:
    """Rollouts of 5 to 20 prompt tokens and 1 to 30 response tokens, `each` of every prompt."""
    generator = np.random.default_rng(seed)
    items = []
    for group in range(prompts):
        prompt = [group] * int(generator.integers(5, 21))
        for index in range(each):
            item = scored(f"r{group}-{index}", prompt, [3] * int(generator.integers(1, 31)))
            items.append(dataclasses.replace(item, rollout=dataclasses.replace(item.rollout, group=group)))
    return items


def num_computed(part: Sequence[ScoredRollout]) -> int:
    """By hand: every prompt once, every response."""
    prompts = {item.rollout.prompt_token_ids.tobytes(): item.rollout.prompt_token_ids.size for item in part}
    return sum(prompts.values()) + sum(item.num_response_tokens for item in part)


def num_read(part: Sequence[ScoredRollout]) -> int:
    """By hand: every prompt for each of its rollouts."""
    return sum(item.rollout.prompt_token_ids.size + item.num_response_tokens for item in part)


def test_a_long_prompt_of_many_short_responses_is_not_read_without_bound() -> None:
    items = [scored(f"r{index:02}", [7] * 500, [3] * 4) for index in range(64)]
    parts = micro_batches(items, 1000)
    assert all(num_computed(part) <= 1000 and num_read(part) <= 4 * 1000 for part in parts)
    # Seven of them are 3,528 tokens to attention, eight would be 4,032.
    assert [len(part) for part in parts] == [7] * 9 + [1]


def test_where_a_model_computes_prompts_again_each_counts() -> None:
    items = siblings(12, 4)
    parts = micro_batches(items, 150, shares_prompts=False)
    assert all(num_read(part) <= 150 for part in parts)
    assert len(parts) > len(micro_batches(items, 150))


@pytest.mark.parametrize("max_tokens", [60, 150, 1000])
def test_rollouts_of_a_prompt_stay_together_and_count_it_once(max_tokens: int) -> None:
    items = siblings(12, 4)
    parts = micro_batches(items[::-1], max_tokens)
    again = micro_batches(items, max_tokens)
    assert [[item.rollout.rollout_id for item in part] for part in parts] == [
        [item.rollout.rollout_id for item in part] for part in again
    ]
    assert sorted(item.rollout.rollout_id for part in parts for item in part) == sorted(
        item.rollout.rollout_id for item in items
    )
    assert all(num_computed(part) <= max_tokens or len(part) == 1 for part in parts)
    for group in range(12):
        whole = num_computed(items[4 * group : 4 * group + 4])
        homes = {index for index, part in enumerate(parts) for item in part if item.rollout.group == group}
        assert len(homes) == 1 or whole > max_tokens
    for part in parts:
        tokens = pack([item.rollout for item in part])
        assert tokens.padding_share <= MAX_PADDING
        assert (len(tokens.input_ids_N) if tokens.sharing is None else len(tokens.sharing.kept_U)) == num_computed(part)


def test_every_token_finds_one_of_its_own_kind_at_its_own_position() -> None:
    tokens = pack([item.rollout for item in siblings(5, 3)])
    sharing = tokens.sharing
    assert sharing is not None and len(sharing.kept_U) < len(tokens.input_ids_N)
    for values_N in (tokens.input_ids_N, tokens.position_ids_N):
        assert torch.equal(sharing.spread(sharing.kept(values_N)), values_N)
    # No two responses, and no response and prompt, stand for each other.
    assert len(set(sharing.source_N[tokens.hidden_index_T + 1].tolist())) == len(tokens.hidden_index_T)
    assert len(set(sharing.source_N.tolist())) == len(sharing.kept_U)


def test_prompts_that_nobody_shares_cost_nothing() -> None:
    assert pack([item.rollout for item in siblings(5, 1)]).sharing is None
