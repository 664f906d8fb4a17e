"""Ties go to the lower id: against a plain sort of (value, id) pairs, with as many ties as can be made."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.errors import InvalidRequestError
from opd.ops import top_k_stable


def _expected_ids(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda index: (-row[index], index))[:k]


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 40).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(-2, 2), min_size=width, max_size=width),
            min_size=1,
            max_size=5,
        )
    ),
    data=st.data(),
)
def test_matches_a_sort_of_pairs_whatever_the_ties(rows: list[list[int]], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(rows[0])))
    values = torch.tensor(rows, dtype=torch.float32)
    ids, kept = top_k_stable(values, k)
    assert ids.tolist() == [_expected_ids(row, k) for row in values.tolist()]
    assert torch.equal(kept, values.gather(-1, ids))


@pytest.mark.parametrize("k", [1, 7, 8, 63, 64])
def test_all_equal_rows_keep_the_first_ids(k: int) -> None:
    ids, kept = top_k_stable(torch.full((3, 64), 0.25), k)
    assert ids.tolist() == [list(range(k))] * 3
    assert kept.shape == (3, k)


def test_a_wide_vocabulary_of_bf16_logits_which_tie_everywhere() -> None:
    values = torch.randn(16, 20_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, _ = top_k_stable(values, 16)
    wide = values.float()
    num_contested = (wide >= wide.gather(-1, ids[:, -1:])).sum(-1) > 16
    assert num_contested.any(), "the input must tie at the boundary for this test to mean anything"
    assert ids.tolist() == [_expected_ids(row, 16) for row in wide.tolist()]


def test_double_values_that_differ_only_beyond_fp32_tie() -> None:
    values = torch.tensor([[1.0, 1.0 + 1e-12, 0.0]], dtype=torch.float64)
    assert top_k_stable(values, 2)[0].tolist() == [[0, 1]]


def test_negative_infinity_and_signed_zero_are_ordinary_values() -> None:
    values = torch.tensor([[-torch.inf, -0.0, 0.0, -torch.inf]])
    assert top_k_stable(values, 3)[0].tolist() == [[1, 2, 0]]


def test_no_rows_gives_no_rows() -> None:
    ids, kept = top_k_stable(torch.empty(0, 5), 2)
    assert ids.shape == kept.shape == (0, 2)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_a_k_outside_the_vocabulary_is_refused(k: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"score_top_k={k} is outside 1..5"):
        top_k_stable(torch.zeros(1, 5), k)


@settings(max_examples=60, deadline=None)
@given(
    num_columns=st.integers(64 * 4 * 3, 64 * 4 * 3 + 200),
    k=st.integers(1, 3),
    num_values=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_wide_rows_ranked_by_groups_match_a_sort_of_pairs(num_columns: int, k: int, num_values: int, seed: int) -> None:
    """Few different values, so that ties cross groups, and widths that leave columns in no group."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, num_values, (4, num_columns), generator=generator).float()
    # A lone winner anywhere, so that the best group is not always the first.
    values[torch.arange(4), torch.randint(0, num_columns, (4,), generator=generator)] = 9.0
    ids, kept = top_k_stable(values, k)
    assert ids.tolist() == [_expected_ids(row, k) for row in values.tolist()]
    assert torch.equal(kept, values.gather(-1, ids))


def test_a_wide_row_with_nan_harms_no_neighbour() -> None:
    values = torch.randn(3, 5_000, generator=torch.Generator().manual_seed(1))
    values[1] = torch.nan
    ids, _ = top_k_stable(values, 8)
    assert ids.shape == (3, 8)
    assert [ids[row].tolist() for row in (0, 2)] == [_expected_ids(values[row].tolist(), 8) for row in (0, 2)]
