"""Row statistics against float64 loops over the whole vocabulary."""

import math

import numpy as np
import pytest
import torch

from opd.errors import ConfigError, InvalidRequestError
from opd.ops import OutputHead, RowStatistics, row_statistics, score_rows, top_k_rows
from opd.types import PAD_ID

NUM_ROWS, HIDDEN, HEAD_ROWS, DEFINED, K = 13, 6, 40, 37, 5


def _hidden(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(NUM_ROWS, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _head(dtype: torch.dtype = torch.float32, **settings: float) -> OutputHead:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(HEAD_ROWS, HIDDEN, generator=generator)
    # Rows without a token hold garbage in real checkpoints; here it would dominate if it were not masked.
    weight[DEFINED:] = 100.0
    bias = torch.randn(HEAD_ROWS, generator=generator)
    return OutputHead(weight_VH=weight.to(dtype), bias_V=bias.to(dtype), **settings)


def _ids(seed: int) -> torch.Tensor:
    return torch.randint(0, DEFINED, (NUM_ROWS, K), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def _brute_force_logprobs(hidden: torch.Tensor, head: OutputHead, temperature: float) -> np.ndarray:
    """[T, defined] in float64 from NumPy alone."""
    logits = hidden.double().numpy() @ head.weight_VH.double().numpy().T + head.bias_V.double().numpy()
    logits = logits * head.logit_scale
    if head.soft_cap is not None:
        logits = head.soft_cap * np.tanh(logits / head.soft_cap)
    tempered = logits[:, :DEFINED] / temperature
    top = tempered.max(axis=-1, keepdims=True)
    return tempered - top - np.log(np.exp(tempered - top).sum(axis=-1, keepdims=True))


def _scored(hidden: torch.Tensor, head: OutputHead, temperature: float, row_chunk: int = 4) -> RowStatistics:
    candidates = _ids(3)
    candidates[2, 3] = PAD_ID
    return score_rows(
        hidden,
        head,
        num_defined_ids=DEFINED,
        sampled_ids_T=_ids(2)[:, 0],
        candidate_ids_TK=candidates,
        score_top_k=K,
        temperature=temperature,
        wants_entropy=True,
        row_chunk=row_chunk,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize(
    "settings", [{}, {"logit_scale": 0.5}, {"soft_cap": 2.0}, {"logit_scale": 3.0, "soft_cap": 5.0}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_field_matches_brute_force(temperature: float, settings: dict[str, float], dtype: torch.dtype) -> None:
    hidden, head = _hidden(dtype=dtype), _head(dtype, **settings)
    expected = _brute_force_logprobs(hidden, head, temperature)
    found = _scored(hidden, head, temperature)
    rows = np.arange(NUM_ROWS)
    assert found.normalizer_T.dtype == torch.float32
    np.testing.assert_allclose(found.sampled_logprobs_T, expected[rows, _ids(2)[:, 0]], atol=1e-5, rtol=1e-5)
    at_candidates = np.take_along_axis(expected, _ids(3).long().numpy(), axis=-1)
    at_candidates[2, 3] = np.nan
    np.testing.assert_allclose(found.candidate_logprobs_TK, at_candidates, atol=1e-5, rtol=1e-5)
    ids = np.argsort(-expected, axis=-1, kind="stable")[:, :K]
    np.testing.assert_array_equal(found.topk_ids_Tk, ids)
    np.testing.assert_allclose(found.topk_logprobs_Tk, np.take_along_axis(expected, ids, -1), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found.entropy_T, -(np.exp(expected) * expected).sum(-1), atol=1e-5, rtol=1e-5)
    assert found.finite_T.all()


def test_bf16_weights_are_not_rounded_to_bf16_logits() -> None:
    hidden, head = _hidden(dtype=torch.bfloat16), _head(torch.bfloat16)
    expected = _brute_force_logprobs(hidden, head, 1.0)[np.arange(NUM_ROWS), _ids(2)[:, 0]]
    rounded = (hidden @ head.weight_VH[:DEFINED].T + head.bias_V[:DEFINED]).float().log_softmax(-1)
    rounded = rounded[torch.arange(NUM_ROWS), _ids(2)[:, 0].long()]
    assert abs(rounded.numpy() - expected).max() > 1e-3, "the naive way must be visibly wrong for this to be a test"
    assert abs(_scored(hidden, head, 1.0).sampled_logprobs_T.numpy() - expected).max() < 1e-5


def test_an_autocast_of_the_caller_changes_nothing() -> None:
    plain = _scored(_hidden(), _head(), 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = _scored(_hidden(), _head(), 1.0)
    assert torch.equal(plain.normalizer_T, cast.normalizer_T)


@pytest.mark.parametrize("row_chunk", [1, 3, 13, 1000])
def test_chunks_do_not_change_the_answer(row_chunk: int) -> None:
    whole, chunked = _scored(_hidden(), _head(), 0.8, NUM_ROWS), _scored(_hidden(), _head(), 0.8, row_chunk)
    assert torch.equal(whole.topk_ids_Tk, chunked.topk_ids_Tk)
    for name in ("normalizer_T", "sampled_logprobs_T", "candidate_logprobs_TK", "topk_logprobs_Tk", "entropy_T"):
        torch.testing.assert_close(getattr(whole, name), getattr(chunked, name), atol=1e-6, rtol=1e-6, equal_nan=True)


def test_logits_in_hand_give_the_same_and_stay_untouched() -> None:
    logits = _head().logits(_hidden())
    before = logits.clone()
    found = row_statistics(
        logits, num_defined_ids=DEFINED, sampled_ids_T=_ids(2)[:, 0], score_top_k=K, wants_entropy=True, row_chunk=4
    )
    assert torch.equal(logits, before)
    expected = _scored(_hidden(), _head(), 1.0)
    assert torch.equal(found.topk_ids_Tk, expected.topk_ids_Tk)
    torch.testing.assert_close(found.entropy_T, expected.entropy_T, atol=1e-6, rtol=1e-6)
    assert found.candidate_logprobs_TK is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_marked_and_its_neighbours_are_exact(bad: float) -> None:
    hidden = _hidden()
    clean = _scored(hidden, _head(), 1.0)
    hidden[5, 0] = bad
    found = _scored(hidden, _head(), 1.0)
    assert found.finite_T.tolist() == [row != 5 for row in range(NUM_ROWS)]
    assert (found.topk_ids_Tk[5] == PAD_ID).all()
    others = found.finite_T
    for name in ("normalizer_T", "sampled_logprobs_T", "candidate_logprobs_TK", "topk_logprobs_Tk", "entropy_T"):
        assert getattr(found, name)[5].isnan().all()
        torch.testing.assert_close(
            getattr(found, name)[others], getattr(clean, name)[others], atol=1e-6, rtol=1e-6, equal_nan=True
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_single_bad_logit_among_ties_is_marked_too(bad: float) -> None:
    logits = torch.ones(2, 6)
    logits[0, 4] = bad
    found = row_statistics(logits, num_defined_ids=6, score_top_k=3, wants_entropy=True)
    assert found.finite_T.tolist() == [False, True]
    assert found.topk_ids_Tk.tolist() == [[PAD_ID] * 3, [0, 1, 2]]
    assert found.topk_logprobs_Tk[0].isnan().all() and found.entropy_T[0].isnan()


def test_garbage_in_a_row_without_a_token_is_no_fault() -> None:
    head = _head()
    head.weight_VH[DEFINED:] = math.nan
    found = _scored(_hidden(), head, 1.0)
    assert found.finite_T.all()
    torch.testing.assert_close(found.entropy_T, _scored(_hidden(), _head(), 1.0).entropy_T)


@pytest.mark.parametrize("temperature", [1e-9, 1e-3, 1e6])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    found = _scored(_hidden(), _head(), temperature)
    assert found.finite_T.all() and found.entropy_T.isfinite().all()
    limit = math.log(DEFINED) if temperature > 1 else 0.0
    assert abs(found.entropy_T - limit).max() < 1e-3


def test_a_large_common_offset_keeps_the_entropy() -> None:
    logits = torch.randn(4, DEFINED, generator=torch.Generator().manual_seed(7))
    # A power of two far above the spread: fp32 keeps 2^-11 of the logits, which is all the error there may be.
    found = row_statistics(logits + 8192.0, num_defined_ids=DEFINED, wants_entropy=True)
    expected = row_statistics((logits + 8192.0).double() - 8192.0, num_defined_ids=DEFINED, wants_entropy=True)
    assert abs(found.entropy_T - expected.entropy_T).max() < 2e-3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_ids_alone_are_those_that_come_with_everything(temperature: float) -> None:
    hidden, head = _hidden(), _head()
    with torch.no_grad():
        # Two columns alike are a tie in every row.
        head.weight_VH[7], head.bias_V[7] = head.weight_VH[3], head.bias_V[3]
    hidden[4, 0] = torch.nan
    settings = {"num_defined_ids": DEFINED, "score_top_k": DEFINED, "temperature": temperature, "row_chunk": 4}
    found = top_k_rows(hidden, head, **settings)
    assert torch.equal(found, score_rows(hidden, head, **settings).topk_ids_Tk)
    assert (found[4] == PAD_ID).all() and (found[:4] >= 0).all()
    for row in (0, 12):
        assert found[row].tolist().index(7) == found[row].tolist().index(3) + 1
    with pytest.raises(InvalidRequestError, match="temperature=0 must be positive"):
        top_k_rows(hidden, head, **(settings | {"temperature": 0}))
    with pytest.raises(InvalidRequestError, match=r"num_defined_ids=41 is outside 1\.\.40"):
        top_k_rows(hidden, head, **(settings | {"num_defined_ids": 41}))


def test_no_rows_is_an_answer_too() -> None:
    found = score_rows(
        torch.empty(0, HIDDEN), _head(), num_defined_ids=DEFINED, score_top_k=2, sampled_ids_T=torch.empty(0).long()
    )
    assert found.topk_ids_Tk.shape == (0, 2) and found.sampled_logprobs_T.shape == (0,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_defined_ids": 41}, "num_defined_ids=41 is outside 1..40"),
        ({"num_defined_ids": 0}, "num_defined_ids=0 is outside"),
        ({"score_top_k": 38}, "score_top_k=38 is outside 0..37"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": math.nan}, "temperature=nan must be positive"),
        ({"sampled_ids_T": torch.zeros(3)}, "sampled_ids_T has 3 rows for 13"),
        ({"candidate_ids_TK": torch.zeros(2, 2)}, "candidate_ids_TK has 2 rows for 13"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        score_rows(_hidden(), _head(), **{"num_defined_ids": DEFINED, **settings})


@pytest.mark.parametrize("soft_cap", [0.0, -1.0])
def test_a_soft_cap_that_is_not_positive_is_refused(soft_cap: float) -> None:
    with pytest.raises(ConfigError, match="soft_cap"):
        _head(soft_cap=soft_cap)
