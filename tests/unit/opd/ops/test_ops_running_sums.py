"""Running sums: numpy's own, what an inverse of them relies on, and a deterministic run on a GPU."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from opd.ops.running_sums import pairwise_running_sums, running_sums
from services.trainer.objectives.credit import later_sums
from services.trainer.rollout.base import SamplingParams
from services.trainer.rollout.token_choice import choose_tokens

LENGTHS = pytest.mark.parametrize("length", [*range(1, 35), 1000, 1023, 1024, 1025, 50_257])


def values(length: int, rows: int = 3) -> torch.Tensor:
    return torch.rand((rows, length), generator=torch.Generator().manual_seed(length))


@LENGTHS
def test_pairs_add_up_to_what_numpy_says(length: int) -> None:
    given = values(length)
    found = pairwise_running_sums(given)
    assert found.dtype == torch.float64
    expected = np.cumsum(given.numpy().astype(np.float64), axis=-1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13, atol=0)
    # A row alone, and one that lies otherwise in memory, has the same bits.
    assert torch.equal(pairwise_running_sums(given[1]), found[1])
    assert torch.equal(pairwise_running_sums(given.T.contiguous().T), found)


def test_whole_numbers_are_exact_and_what_is_given_stays() -> None:
    given = torch.arange(1.0, 101.0, dtype=torch.float64)
    assert pairwise_running_sums(given).tolist() == np.cumsum(np.arange(1, 101)).tolist()
    assert given.tolist() == list(range(1, 101))
    assert pairwise_running_sums(given[:0]).numel() == 0


@LENGTHS
def test_sums_never_fall_and_stay_where_nothing_is_added(length: int) -> None:
    """Else a token without mass could be sampled."""
    given = values(length) ** 8
    given[given < 1e-3] = 0.0
    found = pairwise_running_sums(given)
    steps = found.diff(dim=-1)
    assert (steps >= 0).all()
    assert (steps[given[:, 1:] == 0] == 0).all()


def test_a_cpu_keeps_its_own_sums() -> None:
    given = values(1000)
    assert torch.equal(running_sums(given), given.cumsum(dim=-1, dtype=torch.float64))


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # cuBLAS reads it when its first handle is made.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 3])
def test_a_deterministic_run_samples_and_credits_on_a_gpu(rows: int) -> None:
    given = values(50_257, rows)
    found = running_sums(given.cuda())
    assert torch.equal(found.cpu(), pairwise_running_sums(given))
    assert torch.equal(running_sums(given.cuda()), found)
    uniforms = values(rows, 1)[0].double().cuda()
    for sampling in (SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(temperature=0.7, top_k=50)):
        choices = [choose_tokens(given.cuda() * 9, uniforms, sampling).token_ids_B for _ in range(3)]
        assert all(torch.equal(choice, choices[0]) for choice in choices)
    index_T = torch.arange(64).repeat_interleave(3)
    position_T = torch.arange(3).repeat(64)
    later = later_sums(given[0, :192].cuda(), index_T.cuda(), position_T.cuda())
    torch.testing.assert_close(later.cpu(), later_sums(given[0, :192], index_T, position_T))
