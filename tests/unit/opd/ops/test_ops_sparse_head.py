"""Logits at a few ids: against the whole head in float64, by both ways of taking the product."""

import math

import pytest
import torch

from opd.errors import InvalidRequestError
from opd.ops import OutputHead, support_logits
from opd.ops import sparse_head as sparse_head_module
from opd.types import PAD_ID

NUM_ROWS, HIDDEN, HEAD_ROWS, DEFINED, K = 7, 5, 23, 20, 4
HEADS = [{}, {"logit_scale": 0.5, "soft_cap": 3.0}]


@pytest.fixture(params=["gather", "unique"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces one of the two products, whatever the sizes would choose."""
    monkeypatch.setattr(sparse_head_module, "_UNIQUE_COST", 0 if request.param == "gather" else 1_000)
    return str(request.param)


def case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(HEAD_ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(HEAD_ROWS, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, DEFINED, (NUM_ROWS, K), generator=generator)
    # An id that a row names twice gets both gradients.
    ids[2, 1] = ids[2, 0]
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), ids


@pytest.mark.parametrize("settings", HEADS)
@pytest.mark.parametrize("row_chunk", [1, 3, 100])
def test_values_and_gradients_equal_the_whole_heads(way: str, settings: dict[str, float], row_chunk: int) -> None:
    hidden, weight, bias, ids = case()
    found = support_logits(
        hidden,
        OutputHead(weight_VH=weight, bias_V=bias, **settings),
        ids,
        num_defined_ids=DEFINED,
        temperature=0.7,
        row_chunk=row_chunk,
    )
    upstream = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    gradients = torch.autograd.grad((found * upstream).sum(), (hidden, weight, bias))
    logits = hidden @ weight.T + bias
    if settings:
        logits = settings["soft_cap"] * torch.tanh(logits * settings["logit_scale"] / settings["soft_cap"])
    expected = logits.gather(1, ids) / 0.7
    wanted = torch.autograd.grad((expected * upstream).sum(), (hidden, weight, bias))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", HEADS)
def test_gradients_match_finite_differences(way: str, settings: dict[str, float]) -> None:
    hidden, weight, bias, ids = case()

    def logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        head = OutputHead(weight_VH=weight, bias_V=bias, **settings)
        return support_logits(hidden, head, ids, num_defined_ids=DEFINED, temperature=0.7, row_chunk=3)

    assert torch.autograd.gradcheck(logits, (hidden, weight, bias))


def test_a_tied_weight_gets_the_gradients_of_both_its_uses(way: str) -> None:
    _, weight, _, ids = case()
    tokens = torch.arange(NUM_ROWS)

    def gradient(sparse: bool) -> torch.Tensor:
        hidden = torch.tanh(weight[tokens])
        head = OutputHead(weight_VH=weight)
        whole = head.logits(hidden).gather(1, ids)
        found = support_logits(hidden, head, ids, num_defined_ids=DEFINED, row_chunk=2) if sparse else whole
        return torch.autograd.grad(found.square().sum(), weight)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-12, atol=1e-12)


def test_padding_is_nan_without_a_gradient(way: str) -> None:
    hidden, weight, bias, ids = case()
    ids[:, -1] = PAD_ID
    ids[0, 0] = DEFINED + 1
    found = support_logits(hidden, OutputHead(weight_VH=weight, bias_V=bias), ids, num_defined_ids=DEFINED)
    assert found[:, -1].isnan().all() and found[0, 0].isnan() and found[1:, :-1].isfinite().all()
    found.masked_fill(found.isnan(), 0.0).sum().backward()
    present = (ids >= 0) & (ids < DEFINED)
    expected = torch.zeros_like(weight).index_put((ids[present],), hidden.repeat_interleave(present.sum(1), 0), True)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)
    assert bias.grad.sum() == present.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_accumulated_in_fp32(way: str, dtype: torch.dtype) -> None:
    """Products of bf16 inputs rounded to bf16 would be off by 1e-2 here."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 256, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 256, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(0, 50, (8, 6), generator=generator)
    found = support_logits(hidden, OutputHead(weight_VH=weight), ids, num_defined_ids=50, row_chunk=3)
    expected = (hidden.double() @ weight.double().T).gather(1, ids)
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().max() < 1e-4
    found.sum().backward()
    (wanted_hidden, wanted_weight) = torch.autograd.grad(expected.sum(), (hidden, weight))
    assert hidden.grad.dtype == dtype and weight.grad.dtype == dtype
    assert (hidden.grad.double() - wanted_hidden.double()).norm() <= 1e-2 * wanted_hidden.double().norm()
    assert (weight.grad.double() - wanted_weight.double()).norm() <= 1e-2 * wanted_weight.double().norm()


def test_a_frozen_weight_or_state_is_left_alone(way: str) -> None:
    hidden, weight, _, ids = case()
    support_logits(hidden.detach(), OutputHead(weight_VH=weight), ids, num_defined_ids=DEFINED).sum().backward()
    assert hidden.grad is None and weight.grad is not None
    support_logits(hidden, OutputHead(weight_VH=weight.detach()), ids, num_defined_ids=DEFINED).sum().backward()
    assert hidden.grad is not None


def test_the_same_again_is_bit_equal(way: str) -> None:
    hidden, weight, _, ids = case(torch.float32)

    def once() -> list[torch.Tensor]:
        found = support_logits(hidden, OutputHead(weight_VH=weight), ids, num_defined_ids=DEFINED, row_chunk=2)
        return [found.detach(), *torch.autograd.grad(found.square().sum(), (hidden, weight))]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


def test_both_ways_are_taken_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    is_small = sparse_head_module._is_small
    monkeypatch.setattr(sparse_head_module, "_is_small", lambda *sizes: taken.append(is_small(*sizes)) or taken[-1])
    generator = torch.Generator().manual_seed(0)
    head = OutputHead(weight_VH=torch.randn(5_000, 3, generator=generator))
    hidden = torch.randn(500, 3, generator=generator)
    for num_ids in (10, 5_000):
        ids = torch.randint(0, num_ids, (500, 2), generator=generator)
        support_logits(hidden, head, ids, num_defined_ids=5_000, row_chunk=500)
    assert taken == [True, False]


def test_no_rows_have_no_logits() -> None:
    head = OutputHead(weight_VH=torch.randn(4, 3, requires_grad=True))
    found = support_logits(torch.zeros(0, 3), head, torch.zeros(0, 2, dtype=torch.int64), num_defined_ids=4)
    assert found.shape == (0, 2)
    found.sum().backward()
    assert not head.weight_VH.grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_defined_ids": HEAD_ROWS + 1}, r"num_defined_ids=24 is outside 1\.\.23 head rows"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be positive"),
        ({"temperature": math.nan}, r"temperature=nan must be positive"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, float], message: str) -> None:
    hidden, weight, _, ids = case()
    with pytest.raises(InvalidRequestError, match=message):
        support_logits(hidden, OutputHead(weight_VH=weight), ids, **{"num_defined_ids": DEFINED, **changes})
    with pytest.raises(InvalidRequestError, match="ids_TK has 2 rows for 7 hidden rows"):
        support_logits(hidden, OutputHead(weight_VH=weight), ids[:2], num_defined_ids=DEFINED)
