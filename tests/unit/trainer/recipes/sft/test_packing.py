"""Packing: an example's losses are those it has alone, and a neighbour that is seen would be noticed."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd.errors import UnsupportedError
from services.trainer.recipes.sft.loss import check_packing, token_losses
from services.trainer.recipes.sft.packing import SftExample, attention_masks, build_packed_batch, pack_rows, row_tokens
from services.trainer.student import Student
from tests.unit.trainer.tiny_training import NUM_IDS, tiny_model


def examples(seed: int, count: int, *, longest: int = 12) -> list[SftExample]:
    generator = np.random.default_rng(seed)

    def ids(limit: int) -> tuple[int, ...]:
        return tuple(generator.integers(0, NUM_IDS, size=generator.integers(1, limit + 1)).tolist())

    return [
        SftExample(name=str(index), prompt_token_ids=ids(longest // 2), response_token_ids=ids(longest // 2))
        for index in range(count)
    ]


def student(**changes: Any) -> Student:
    """In float64, so that a difference is one of meaning and not of rounding (norms round to fp32 all the same)."""
    return Student(tiny_model(3, **changes).double(), num_defined_ids=NUM_IDS)


def losses_alone(model: Any, example: SftExample) -> Tensor:
    """Independent: one plain forward pass of the library over one example, without mask, positions or padding."""
    ids = torch.tensor(example.prompt_token_ids + example.response_token_ids)
    logprobs_LV = model(input_ids=ids[None]).logits[0].double().log_softmax(dim=-1)
    places = torch.arange(len(example.prompt_token_ids) - 1, len(ids) - 1)
    return -logprobs_LV[places, ids[places + 1]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_implementation": "eager"},
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ],
)
def test_packed_examples_have_the_losses_and_gradients_they_have_alone(changes: dict[str, Any]) -> None:
    packed = student(**changes)
    given = examples(1, 9)
    rows = pack_rows(given, 24)
    assert max(len(row) for row in rows) > 1 and len(rows) > 1
    losses_T = token_losses(packed, build_packed_batch(rows))
    losses_T.sum().backward()
    plain = tiny_model(3, **changes).double()
    expected_T = torch.cat([losses_alone(plain, example) for row in rows for example in row])
    expected_T.sum().backward()
    torch.testing.assert_close(losses_T, expected_T, rtol=0, atol=2e-6)
    for (name, found), expected in zip(packed.model.named_parameters(), plain.parameters(), strict=True):
        assert found.grad is not None and expected.grad is not None, name
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("broken", ["segments", "positions"])
def test_a_neighbour_that_is_seen_would_be_noticed(broken: str) -> None:
    """The check above has teeth: with one segment for all, or positions that run on, losses change."""
    packed = student()
    given = examples(1, 4)
    batch = build_packed_batch([given])
    if broken == "segments":
        batch.segment_ids_BS.fill_(1)
    else:
        batch.position_ids_BS.copy_(torch.arange(batch.position_ids_BS.shape[1])[None])
        # Rotary positions are relative, so they matter only where a gap opens inside an example.
        batch.position_ids_BS.mul_(3)
    with torch.no_grad():
        found_T = token_losses(packed, batch)
        expected_T = torch.cat([losses_alone(packed.model, example) for example in given])
    assert float((found_T - expected_T).abs().max()) > 1e-3


def test_masks_let_a_token_see_its_own_example_before_it_and_nothing_else() -> None:
    rows = [examples(2, 3), examples(3, 1)]
    batch = build_packed_batch(rows)
    config = tiny_model(0).config
    mask_BSS = attention_masks(batch, config, torch.float32)["full_attention"][:, 0]
    segments_BS = batch.segment_ids_BS.numpy()
    for row in range(2):
        for query in range(segments_BS.shape[1]):
            seen = [place for place in range(query + 1) if segments_BS[row, place] == segments_BS[row, query]]
            assert mask_BSS[row, query].nonzero().flatten().tolist() == seen


def test_rows_keep_to_their_limit_and_lose_nothing() -> None:
    given = examples(4, 200)
    rows = pack_rows(given, 30)
    assert sorted(example.name for row in rows for example in row) == sorted(example.name for example in given)
    assert max(row_tokens(row) for row in rows) <= 30
    # First fit leaves at most one row in the open window half empty.
    assert sum(row_tokens(row) for row in rows) / (30 * len(rows)) > 0.85
    assert [len(row) for row in pack_rows(given, 30, packing=False)] == [1] * 200


def test_an_architecture_that_ignores_the_mask_is_refused() -> None:
    """A model that sees everything before it, whatever it is told."""
    fine = student()
    check_packing(fine)
    original = fine.model.model.forward

    def forward(**inputs: Any) -> Any:
        return original(**(inputs | {"attention_mask": None, "position_ids": None}))

    fine.model.model.forward = forward
    with pytest.raises(UnsupportedError, match=r"changes by .* with its neighbour in a row; set sft\.packing=false"):
        check_packing(fine)
