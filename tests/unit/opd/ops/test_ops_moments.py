"""Normaliser and entropy against float64, in blocks of every shape, compiled and not."""

import math

import numpy as np
import pytest
import torch

from opd.ops import moments
from opd.ops.moments import GROUP, RowMoments, row_moments


def _expected(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    wide = logits.double().numpy()
    top = wide.max(-1, keepdims=True)
    normalizer = np.log(np.exp(wide - top).sum(-1)) + top[:, 0]
    logprobs = wide - normalizer[:, None]
    return normalizer, -(np.exp(logprobs) * logprobs).sum(-1)


def pair(found: RowMoments) -> tuple[torch.Tensor, torch.Tensor]:
    return found.normalizer_C, found.entropy_C


@pytest.mark.parametrize("num_columns", [10, 64, 1_000])
def test_maxima_are_those_of_whole_groups(num_columns: int) -> None:
    logits = _logits(9, num_columns)
    expected = [
        [max(row[at : at + GROUP]) for at in range(0, num_columns // GROUP * GROUP, GROUP)] for row in logits.tolist()
    ]
    for found in (row_moments(logits).group_maxima_CG, moments._eager(logits)[2]):
        assert found.tolist() == expected


def _logits(num_rows: int, num_columns: int) -> torch.Tensor:
    return 3.0 * torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(num_rows + num_columns))


@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 1), (7, 512), (129, 512), (5, 65_537), (3, 151_936)])
def test_blocks_of_every_shape_match_float64(num_rows: int, num_columns: int) -> None:
    logits = _logits(num_rows, num_columns)
    for found, expected in zip(pair(row_moments(logits)), _expected(logits), strict=True):
        np.testing.assert_allclose(found, expected, atol=3e-6, rtol=1e-6)


def test_float64_stays_float64() -> None:
    logits = _logits(3, 700).double()
    for found, expected in zip(pair(row_moments(logits)), _expected(logits), strict=True):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_columns_cut_off_a_wider_tensor_are_not_seen() -> None:
    wide = _logits(5, 900)
    wide[:, 800:] = math.nan
    for found, expected in zip(pair(row_moments(wide[:, :800])), _expected(wide[:, :800]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_logit_spoils_its_row_alone(bad: float) -> None:
    logits = _logits(4, 1_000)
    logits[2, 123] = bad
    for found in (*pair(row_moments(logits)), *moments._eager(logits)[:2]):
        assert found.isnan().tolist() == [False, False, True, False]


def test_rows_do_not_depend_on_their_neighbours() -> None:
    logits = _logits(130, 512)
    whole = pair(row_moments(logits))
    for row in (0, 77, 129):
        alone = pair(row_moments(logits[row : row + 1]))
        assert all(
            float(one[0]) == pytest.approx(float(all_[row]), abs=1e-6) for one, all_ in zip(alone, whole, strict=True)
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_the_compiled_kernel_gives_the_same() -> None:
    moments._compiled.cache_clear()
    for num_rows in (8, 5, 1, 0):
        logits = _logits(num_rows, 5_000)
        if not num_rows:
            assert moments._on_device(logits)[0].shape == (0,)
            continue
        for found, expected in zip(moments._on_device(logits)[:2], _expected(logits), strict=True):
            np.testing.assert_allclose(found, expected, atol=3e-6, rtol=1e-6)
    assert moments._compiled() is not None, "it fell back, so this test said nothing of the compiled kernel"


@pytest.mark.parametrize("num_rows", [0, 1])
def test_one_row_or_none_is_never_compiled_for(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row of a long response, or a mask that asks for none: it must not hold up whoever waits behind it."""

    def compiled(_: torch.Tensor) -> None:
        raise AssertionError("compiled for a shape of its own")

    monkeypatch.setattr(moments, "_compiled", lambda: compiled)
    monkeypatch.setenv(moments.NO_COMPILE, "")
    logits = _logits(num_rows, 300)
    normalizer, entropy, maxima = moments._on_device(logits)
    assert (normalizer.shape, entropy.shape, maxima.shape) == ((num_rows,), (num_rows,), (num_rows, 4))
    assert not moments.os.environ[moments.NO_COMPILE], "it gave up compiling for all later requests"


def test_without_a_compiler_the_answer_is_the_same_and_it_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(logits: torch.Tensor) -> None:
        tried.append(logits.shape)
        raise RuntimeError("no compiler here")

    monkeypatch.setenv(moments.NO_COMPILE, "")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    moments._compiled.cache_clear()
    logits = _logits(4, 300)
    for _ in range(2):
        for found, expected in zip(moments._on_device(logits)[:2], _expected(logits), strict=True):
            np.testing.assert_allclose(found, expected, atol=3e-6, rtol=1e-6)
    assert len(tried) == 1
    moments._compiled.cache_clear()
