"""Batches: shared prompts change nothing, streams restart anywhere, padding is small."""

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from testbed.architecture import Size, create_model
from testbed.batches import (
    Batch,
    Position,
    collate,
    cut,
    demonstration_batches,
    encode,
    encode_demonstrations,
)
from testbed.demonstrations import IMPERFECT, Demonstration, Recipe, grouped_demonstrations
from testbed.tokenizer import END, PAD, prompt_text, train_tokenizer
from testbed.training import batch_loss, mean_loss

TINY = Size(hidden=32, layers=2, heads=2, key_value_heads=1, intermediate=48, dtype=torch.float32, head_dim=16)
START = Position(chunk=0, offset=0)


@pytest.fixture(scope="module")
def groups() -> list[list[Demonstration]]:
    recipe = Recipe(long_share=0.0)
    return list(islice(grouped_demonstrations(1, recipe, num_solutions=3), 12))


@pytest.fixture(scope="module")
def tokenizer(groups: list[list[Demonstration]]) -> PreTrainedTokenizerFast:
    return train_tokenizer(demo.prompt + demo.response for group in groups for demo in group)


def batches_of(tokenizer: PreTrainedTokenizerFast, start: Position) -> Iterator[Batch]:
    return demonstration_batches(tokenizer, IMPERFECT, "test", 4096, start)


def test_sharing_a_prompt_does_not_change_the_loss(
    tokenizer: PreTrainedTokenizerFast, groups: list[list[Demonstration]]
) -> None:
    model = create_model(TINY, tokenizer, 0)
    # Sharp random weights make every wrongly seen token or shifted position visible in the loss.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    shared = [collate(group, 0, START) for group in cut(encode_demonstrations(tokenizer, groups), 2048)]
    alone = encode(tokenizer, ((demo.prompt, [demo.response]) for group in groups for demo in group))
    separate = [collate(group, 0, START) for group in cut(alone, 2048)]
    assert mean_loss(model, shared) == pytest.approx(mean_loss(model, separate), rel=1e-5)
    assert sum(batch.ids_BT.numel() for batch in shared) < sum(batch.ids_BT.numel() for batch in separate)


def test_the_loss_is_that_of_plain_causal_training(tokenizer: PreTrainedTokenizerFast) -> None:
    model = create_model(TINY, tokenizer, 0)
    prompt, response = prompt_text("What is 4+5?"), f"Answer: 9{END}\n{PAD}"
    batch = collate(encode(tokenizer, [("What is 4+5?", ["Answer: 9"])]), 0, START)
    ids = torch.tensor([tokenizer(prompt + response)["input_ids"]])
    labels = ids.clone()
    labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
    assert torch.equal(batch.ids_BT, ids)
    assert batch_loss(model, batch).item() == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)


def test_batches_keep_the_token_limit_and_pad_little(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = list(islice(batches_of(tokenizer, START), 30))
    assert all(batch.ids_BT.numel() <= 4096 for batch in batches)
    padding = sum(int((batch.ids_BT == tokenizer.pad_token_id).sum()) for batch in batches)
    assert padding / sum(batch.ids_BT.numel() for batch in batches) < 0.1


def test_a_stream_restarts_at_any_position(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = list(islice(batches_of(tokenizer, START), 6))
    again = list(islice(batches_of(tokenizer, whole[2].after), 3))
    for first, second in zip(whole[3:], again, strict=True):
        assert torch.equal(first.ids_BT, second.ids_BT)
        assert first.after == second.after
    assert not torch.equal(whole[0].ids_BT, next(batches_of(tokenizer, Position(chunk=1, offset=0))).ids_BT)


def test_cut_keeps_every_example_once(tokenizer: PreTrainedTokenizerFast, groups: list[list[Demonstration]]) -> None:
    examples = encode_demonstrations(tokenizer, groups)
    assert sorted(id(one) for group in cut(examples, 700) for one in group) == sorted(map(id, examples))
    assert [len(group) for group in cut(examples, 1)] == [1] * len(examples)
