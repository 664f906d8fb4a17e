"""The student's differentiable pass: values, gradients and memory."""

import math

import pytest
import torch

from opd.errors import InvalidRequestError
from opd.ops import MASKED_LOGIT, OutputHead, student_scores, support_logprobs
from opd.types import PAD_ID

NUM_ROWS, HIDDEN, HEAD_ROWS, DEFINED, K = 7, 5, 23, 20, 4


def _case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(HEAD_ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(HEAD_ROWS, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, DEFINED, (NUM_ROWS, K), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), ids


@pytest.mark.parametrize("settings", [{}, {"logit_scale": 0.5, "soft_cap": 3.0}])
def test_gradients_match_finite_differences(settings: dict[str, float]) -> None:
    hidden, weight, bias, ids = _case()

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        head = OutputHead(weight_VH=weight, bias_V=bias, **settings)
        return support_logprobs(hidden, head, ids, num_defined_ids=DEFINED, temperature=0.7, row_chunk=3)

    assert torch.autograd.gradcheck(logprobs, (hidden, weight, bias))


def test_values_and_gradient_follow_the_closed_form() -> None:
    hidden, weight, _, ids = _case()
    found = support_logprobs(
        hidden, OutputHead(weight_VH=weight), ids, num_defined_ids=DEFINED, temperature=0.7, row_chunk=2
    )
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found.backward(upstream)
    with torch.no_grad():
        logits = (hidden @ weight.T)[:, :DEFINED] / 0.7
        probs = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
        torch.testing.assert_close(found, probs.log().gather(-1, ids), atol=1e-12, rtol=1e-12)
        # d logprob(id) / d logit(v) = (1[v = id] - probs(v)) / temperature, summed with the upstream weights.
        grad_logits = torch.zeros_like(probs).scatter_add_(-1, ids, upstream) - probs * upstream.sum(-1, keepdim=True)
        expected = grad_logits / 0.7 @ weight[:DEFINED]
    torch.testing.assert_close(hidden.grad, expected, atol=1e-12, rtol=1e-12)
    assert not weight.grad[DEFINED:].any(), "rows without a token take no part"


def test_padding_is_nan_without_a_gradient() -> None:
    hidden, weight, _, ids = _case()
    ids[:, -1] = PAD_ID
    found = support_logprobs(hidden, OutputHead(weight_VH=weight), ids, num_defined_ids=DEFINED, row_chunk=3)
    assert found[:, -1].isnan().all() and found[:, :-1].isfinite().all()
    found.masked_fill(found.isnan(), 0.0).sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    without = hidden.detach().requires_grad_()
    head = OutputHead(weight_VH=weight)
    support_logprobs(without, head, ids[:, :-1], num_defined_ids=DEFINED).sum().backward()
    torch.testing.assert_close(hidden.grad, without.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_give_fp32_log_probs_and_close_gradients(dtype: torch.dtype) -> None:
    low = _case(dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in low[:3]]
    found = support_logprobs(
        low[0], OutputHead(weight_VH=low[1], bias_V=low[2]), low[3], num_defined_ids=DEFINED, row_chunk=3
    )
    expected = support_logprobs(wide[0], OutputHead(weight_VH=wide[1], bias_V=wide[2]), low[3], num_defined_ids=DEFINED)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    for narrow, exact in zip(low[:2], wide[:2], strict=True):
        assert narrow.grad.dtype == dtype
        error = (narrow.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < 4 * torch.finfo(dtype).eps


def test_mixed_precision_is_promoted_and_autocast_is_kept_out() -> None:
    hidden, weight, _, ids = _case(torch.float32)
    plain = support_logprobs(hidden, OutputHead(weight_VH=weight), ids, num_defined_ids=DEFINED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = support_logprobs(hidden, OutputHead(weight_VH=weight), ids, num_defined_ids=DEFINED)
        cast.sum().backward()
    assert torch.equal(plain, cast)
    mixed = support_logprobs(hidden.bfloat16(), OutputHead(weight_VH=weight), ids, num_defined_ids=DEFINED)
    exact = support_logprobs(hidden.bfloat16().double(), OutputHead(weight_VH=weight), ids, num_defined_ids=DEFINED)
    torch.testing.assert_close(mixed.double(), exact, atol=1e-5, rtol=1e-5)


def test_no_more_than_one_chunk_of_logits_is_kept_for_the_way_back() -> None:
    hidden, weight, _, ids = _case(torch.float32)
    num_rows, row_chunk = 64, 4
    hidden, ids = hidden.detach().repeat(num_rows, 1)[:num_rows].requires_grad_(), ids.repeat(num_rows, 1)[:num_rows]
    saved: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = support_logprobs(
            hidden, OutputHead(weight_VH=weight), ids, num_defined_ids=DEFINED, row_chunk=row_chunk
        )
    found.sum().backward()
    assert not [shape for shape in saved if shape[-1:] == (HEAD_ROWS,)], "logits must be recomputed, not kept"
    assert hidden.grad.shape == hidden.shape


def test_without_gradients_it_is_the_same_number() -> None:
    hidden, weight, _, ids = _case()
    head = OutputHead(weight_VH=weight)
    with torch.no_grad():
        still = support_logprobs(hidden, head, ids, num_defined_ids=DEFINED, row_chunk=2)
    assert not still.requires_grad
    torch.testing.assert_close(still, support_logprobs(hidden, head, ids, num_defined_ids=DEFINED))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_defined_ids": 24}, "num_defined_ids=24"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"ids_TK": torch.zeros(3, 2)}, "ids_TK has 3 rows for 7"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    hidden, weight, _, ids = _case()
    with pytest.raises(InvalidRequestError, match=message):
        support_logprobs(
            hidden, OutputHead(weight_VH=weight), **{"ids_TK": ids, "num_defined_ids": DEFINED, **settings}
        )


def test_entropy_and_the_mass_outside_a_support_follow_their_definitions() -> None:
    hidden, weight, bias, ids = _case()
    support = torch.cat([ids, torch.full((len(ids), 1), PAD_ID)], dim=1)
    support[0] = PAD_ID
    head = OutputHead(weight_VH=weight, bias_V=bias)
    scores = student_scores(
        hidden, head, ids, num_defined_ids=DEFINED, support_ids_TS=support, wants_entropy=True, temperature=0.7,
        row_chunk=3,
    )  # fmt: skip
    (scores.outside_logprobs_T.sin() + scores.entropy_T).sum().backward()
    twin = hidden.detach().clone().requires_grad_()
    probs = ((twin @ weight.detach().T + bias.detach())[:, :DEFINED] / 0.7).softmax(-1)
    outside_ids = [[v for v in range(DEFINED) if v not in chosen] for chosen in support.tolist()]
    outside = torch.stack([probs[row, chosen].sum() for row, chosen in enumerate(outside_ids)]).log()
    entropy = -(probs * probs.log()).sum(-1)
    torch.testing.assert_close(scores.outside_logprobs_T, outside, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(scores.entropy_T, entropy, atol=1e-12, rtol=1e-12)
    assert scores.outside_logprobs_T[0].abs() < 1e-12, "all of the mass is outside an empty support"
    (outside.sin() + entropy).sum().backward()
    torch.testing.assert_close(hidden.grad, twin.grad, atol=1e-12, rtol=1e-12)


def test_a_tiny_mass_outside_keeps_its_digits_and_none_at_all_is_finite() -> None:
    """1 - P_S would be 0 or a rounding error here."""
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[40.0], [0.0], [-1.0]])
    settings = {"num_defined_ids": 3, "support_ids_TS": torch.tensor([[0]])}
    found = student_scores(hidden, OutputHead(weight_VH=weight), torch.tensor([[0]]), **settings)
    expected = math.log(1 + math.exp(-1)) - 40 - math.log1p(math.exp(-40) + math.exp(-41))
    assert found.outside_logprobs_T.item() == pytest.approx(expected, rel=1e-6)
    everything = student_scores(
        hidden, OutputHead(weight_VH=weight), torch.tensor([[0]]), num_defined_ids=3,
        support_ids_TS=torch.tensor([[2, 0, 1]]),
    )  # fmt: skip
    assert MASKED_LOGIT * 1.1 < everything.outside_logprobs_T.item() < MASKED_LOGIT / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_mixed_precision_product_of_the_device_agrees_with_float64() -> None:
    hidden, weight, _, ids = (tensor.detach().cuda() for tensor in _case(torch.bfloat16))
    hidden.requires_grad_(), weight.requires_grad_()
    found = support_logprobs(hidden, OutputHead(weight_VH=weight), ids, num_defined_ids=DEFINED, row_chunk=4)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = support_logprobs(wide[0], OutputHead(weight_VH=wide[1]), ids, num_defined_ids=DEFINED)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    for narrow, exact in zip((hidden, weight), wide, strict=True):
        assert (narrow.grad.double() - exact.grad).norm() < 0.02 * exact.grad.norm()
