"""The whole vocabulary against brute force in float64, value and gradient, and the memory it is allowed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from opd.errors import InvalidRequestError
from opd.ops import OutputHead, defined_head, full_divergence, full_logprobs
from opd.ops.full_vocabulary import as_stored

ROWS, HIDDEN, WIDER, VOCAB, TEACHER_VOCAB, DEFINED = 11, 6, 9, 23, 28, 20


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def heads(dtype: torch.dtype = torch.float64) -> tuple[OutputHead, OutputHead]:
    student = OutputHead(weight_VH=randn(1, VOCAB, HIDDEN, dtype=dtype), bias_V=randn(2, VOCAB, dtype=dtype))
    teacher = OutputHead(
        weight_VH=randn(3, TEACHER_VOCAB, WIDER, dtype=dtype),
        bias_V=randn(4, TEACHER_VOCAB, dtype=dtype),
        logit_scale=0.7,
        soft_cap=5.0,
    )
    return student, teacher


def brute_logprobs(hidden: Tensor, head: OutputHead, temperature: float) -> Tensor:
    """Rows without a token are cut off, then the normaliser is taken: from the definition, in float64."""
    logits = hidden.double() @ head.weight_VH.double().T
    if head.bias_V is not None:
        logits = logits + head.bias_V.double()
    logits = logits * head.logit_scale
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    logits = logits[:, :DEFINED] / temperature
    return logits - logits.exp().sum(dim=-1, keepdim=True).log()


def brute_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * (student - teacher)).sum(dim=-1)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.6, 1.7)])
@pytest.mark.parametrize("row_chunk", [1, 4, 256])
def test_value_and_gradient_are_those_of_the_definition(temperatures: tuple[float, float], row_chunk: int) -> None:
    student_head, teacher_head = heads()
    weights = randn(7, ROWS)
    teacher_hidden, ids = randn(6, ROWS, WIDER), torch.arange(ROWS)[:, None] % DEFINED
    found, expected = [], []
    for is_brute, gathered in ((False, found), (True, expected)):
        hidden = randn(5, ROWS, HIDDEN).requires_grad_()
        weight = student_head.weight_VH.clone().requires_grad_()
        head = OutputHead(weight_VH=weight, bias_V=student_head.bias_V)
        if is_brute:
            logprobs = brute_logprobs(hidden, head, temperatures[0])
            kl = brute_kl(logprobs, brute_logprobs(teacher_hidden, teacher_head, temperatures[1]))
            sampled = logprobs.gather(1, ids)
        else:
            scores = full_divergence(
                hidden, head, teacher_hidden, teacher_head, ids, num_defined_ids=DEFINED, row_chunk=row_chunk,
                student_temperature=temperatures[0], teacher_temperature=temperatures[1],
            )  # fmt: skip
            kl, sampled = scores.divergence_T, scores.student_logprobs_TK
        ((kl * weights).sum() + sampled.sum()).backward()
        gathered += [kl.detach(), sampled.detach(), hidden.grad, weight.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert (found[0] > 0).all()


def test_single_precision_agrees_with_double() -> None:
    student_head, teacher_head = heads(torch.float32)
    hidden, teacher_hidden = randn(5, ROWS, HIDDEN).float(), randn(6, ROWS, WIDER).float()
    ids = torch.zeros(ROWS, 1, dtype=torch.int64)
    found = full_divergence(hidden, student_head, teacher_hidden, teacher_head, ids, num_defined_ids=DEFINED)
    expected = brute_kl(brute_logprobs(hidden, student_head, 1.0), brute_logprobs(teacher_hidden, teacher_head, 1.0))
    assert (found.divergence_T.double() - expected).abs().max() < 1e-5


def test_equal_models_have_no_divergence_and_no_gradient() -> None:
    head = heads()[0]
    hidden = randn(5, ROWS, HIDDEN).requires_grad_()
    ids = torch.zeros(ROWS, 1, dtype=torch.int64)
    kl = full_divergence(hidden, head, hidden.detach(), head, ids, num_defined_ids=DEFINED).divergence_T
    kl.sum().backward()
    assert kl.abs().max() < 1e-14 and hidden.grad is not None and hidden.grad.abs().max() < 1e-14


def test_log_probs_come_in_blocks_and_are_exact() -> None:
    teacher_head = heads(torch.float32)[1]
    hidden = randn(6, ROWS, WIDER).float()
    blocks = list(full_logprobs(hidden, teacher_head, num_defined_ids=DEFINED, temperature=1.3, row_chunk=4))
    assert [tuple(block.shape) for block in blocks] == [(4, DEFINED), (4, DEFINED), (3, DEFINED)]
    assert (torch.cat(blocks).double() - brute_logprobs(hidden, teacher_head, 1.3)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widened_states_are_narrowed_again_only_where_nothing_is_lost(dtype: torch.dtype) -> None:
    stored = randn(6, ROWS, WIDER, dtype=dtype)
    assert torch.equal(as_stored(stored.float(), dtype), stored)
    exact = randn(6, ROWS, WIDER).float()
    assert as_stored(exact, dtype) is exact
    teacher_head = heads(dtype)[1]
    wide = torch.cat(list(full_logprobs(stored.float(), teacher_head, num_defined_ids=DEFINED)))
    assert torch.equal(wide, torch.cat(list(full_logprobs(stored, teacher_head, num_defined_ids=DEFINED))))


class _LargestSaved:
    """The largest tensor that autograd keeps, in elements."""

    def __init__(self) -> None:
        self.num_elements = 0

    def pack(self, tensor: Tensor) -> Tensor:
        self.num_elements = max(self.num_elements, tensor.numel())
        return tensor


def test_no_block_of_logits_is_kept_for_the_way_back() -> None:
    rows, vocab = 64, 5000
    head = OutputHead(weight_VH=randn(1, vocab, 2))
    hidden = randn(5, rows, 2).requires_grad_()
    saved = _LargestSaved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        scores = full_divergence(
            hidden, head, randn(6, rows, 2), head, torch.zeros(rows, 1, dtype=torch.int64), num_defined_ids=vocab,
            row_chunk=16,
        )  # fmt: skip
    assert scores.divergence_T.requires_grad
    # The head itself is [vocab, 2]; a block of logits would be [16, vocab].
    assert saved.num_elements <= 2 * vocab


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_defined_ids": VOCAB + 1}, "num_defined_ids=24 is outside 1..23"),
        ({"student_temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"teacher_temperature": -1.0}, "temperature=-1.0 must be positive"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    student_head, teacher_head = heads()
    ids = torch.zeros(ROWS, 1, dtype=torch.int64)
    settings: dict[str, Any] = {"num_defined_ids": DEFINED, **change}
    with pytest.raises(InvalidRequestError, match=message):
        full_divergence(randn(5, ROWS, HIDDEN), student_head, randn(6, ROWS, WIDER), teacher_head, ids, **settings)


def test_rows_that_do_not_match_are_refused() -> None:
    student_head, teacher_head = heads()
    ids = torch.zeros(ROWS, 1, dtype=torch.int64)
    with pytest.raises(InvalidRequestError, match="teacher_hidden_TG has 3 rows and ids_TK 11 for 11 hidden rows"):
        full_divergence(
            randn(5, ROWS, HIDDEN), student_head, randn(6, 3, WIDER), teacher_head, ids, num_defined_ids=DEFINED
        )


def test_the_defined_head_shares_the_weight() -> None:
    head = heads()[0]
    cut = defined_head(head, DEFINED)
    assert cut.num_rows == DEFINED and cut.weight_VH.data_ptr() == head.weight_VH.data_ptr()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_every_form_and_the_entropy_are_those_of_the_definition(beta: float) -> None:
    student_head, teacher_head = heads()
    teacher_hidden, ids, weights = randn(6, ROWS, WIDER), torch.zeros(ROWS, 1, dtype=torch.int64), randn(8, ROWS)
    gradients, values = [], []
    for is_brute in (True, False):
        hidden = randn(5, ROWS, HIDDEN).requires_grad_()
        if is_brute:
            student = brute_logprobs(hidden, student_head, 1.3)
            teacher = brute_logprobs(teacher_hidden, teacher_head, 1.0)
            mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
            divergence = beta * brute_kl(teacher, mixture) + (1 - beta) * brute_kl(student, mixture)
            if beta in (0.0, 1.0):
                divergence = brute_kl(student, teacher) if beta else brute_kl(teacher, student)
            entropy = -(student.exp() * student).sum(-1)
        else:
            scores = full_divergence(
                hidden, student_head, teacher_hidden, teacher_head, ids, num_defined_ids=DEFINED, row_chunk=4,
                student_temperature=1.3, beta=beta, wants_entropy=True,
            )  # fmt: skip
            divergence, entropy = scores.divergence_T, scores.student_entropy_T
        (divergence * weights + 0.1 * entropy).sum().backward()
        gradients.append(hidden.grad)
        values.append(torch.stack([divergence, entropy]).detach())
    torch.testing.assert_close(values[1], values[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-12, rtol=1e-12)
