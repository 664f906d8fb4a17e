"""Credit for later positions against the gradient of the whole response's divergence, by enumeration in float64."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from services.trainer.objectives import Credit, ObjectiveConfig
from services.trainer.objectives.contract import LossInputs, Term
from services.trainer.objectives.credit import Discounted, ToGo, later_sums
from services.trainer.objectives.dispatch import build_objective
from services.trainer.objectives.full_vocabulary import FullVocabulary
from services.trainer.objectives.sampled_token import SampledToken
from tests.unit.trainer.objectives.conftest import TinyModels

Make = Callable[..., TinyModels]
NUM_IDS, LENGTH = 3, 3


def tree(seed: int) -> Tensor:
    """Logits [prefixes, ids] of a model over responses of three tokens, one row for each prefix."""
    generator = torch.Generator().manual_seed(seed)
    num_prefixes = sum(NUM_IDS**depth for depth in range(LENGTH))
    return torch.randn(num_prefixes, NUM_IDS, generator=generator, dtype=torch.float64)


def rows_of(response: tuple[int, ...]) -> list[int]:
    """The row of each prefix of a response."""
    rows, first = [], 0
    for depth in range(LENGTH):
        rows.append(first + sum(token * NUM_IDS**place for place, token in enumerate(response[:depth])))
        first += NUM_IDS**depth
    return rows


def inputs_of(student: Tensor, teacher: Tensor, response: tuple[int, ...]) -> LossInputs:
    student_TV = student[rows_of(response)].log_softmax(-1)
    teacher_TV = teacher[rows_of(response)].log_softmax(-1)
    sampled_T1 = torch.tensor(response)[:, None]
    return LossInputs(
        valid_T=torch.ones(LENGTH, dtype=torch.bool),
        position_T=torch.arange(LENGTH),
        rollout_index_T=torch.zeros(LENGTH, dtype=torch.int64),
        full_divergence_T=(student_TV.exp() * (student_TV - teacher_TV)).sum(-1),
        student_sampled_logprobs_T=student_TV.gather(1, sampled_T1)[:, 0],
        teacher_sampled_logprobs_T=teacher_TV.gather(1, sampled_T1)[:, 0],
    )


def expected_gradient(student: Tensor, teacher: Tensor, term: Term) -> Tensor:
    """Over all responses, each weighted with its probability, which is held constant."""
    total = torch.zeros_like(student)
    for response in itertools.product(range(NUM_IDS), repeat=LENGTH):
        inputs = inputs_of(student, teacher, response)
        (gradient,) = torch.autograd.grad(term(inputs).loss_T.sum(), student)
        total += inputs.student_sampled_logprobs_T.detach().sum().exp() * gradient
    return total


def sequence_divergence(student: Tensor, teacher: Tensor, discount: float = 1.0) -> Tensor:
    """E over responses of the sum of discounted divergences; with discount 1 it is the KL of whole responses."""
    total = torch.zeros((), dtype=torch.float64)
    for response in itertools.product(range(NUM_IDS), repeat=LENGTH):
        inputs = inputs_of(student, teacher, response)
        weights_T = discount ** torch.arange(LENGTH, dtype=torch.float64)
        total = total + inputs.student_sampled_logprobs_T.sum().exp() * (inputs.full_divergence_T * weights_T).sum()
    return total


@pytest.mark.parametrize("term", [SampledToken(), FullVocabulary()], ids=["sampled", "full"])
def test_to_go_is_the_gradient_of_the_whole_responses_divergence_and_local_is_not(term: Term) -> None:
    student, teacher = tree(0).requires_grad_(), tree(1)
    (expected,) = torch.autograd.grad(sequence_divergence(student, teacher), student)
    torch.testing.assert_close(expected_gradient(student, teacher, ToGo(term=term)), expected, atol=1e-12, rtol=1e-11)
    assert (expected_gradient(student, teacher, term) - expected).norm() > 0.01


def test_the_divergence_of_whole_responses_is_the_sum_over_positions() -> None:
    """So that what the test above compares with is itself what it is said to be."""
    student, teacher = tree(0), tree(1)
    whole = torch.zeros((), dtype=torch.float64)
    for response in itertools.product(range(NUM_IDS), repeat=LENGTH):
        inputs = inputs_of(student, teacher, response)
        p, q = inputs.student_sampled_logprobs_T.sum(), inputs.teacher_sampled_logprobs_T.sum()
        whole = whole + p.exp() * (p - q)
    torch.testing.assert_close(sequence_divergence(student, teacher), whole, atol=1e-12, rtol=1e-12)


def test_a_discount_inside_to_go_is_that_of_the_discounted_sum() -> None:
    student, teacher = tree(2).requires_grad_(), tree(3)
    term = ToGo(term=Discounted(term=FullVocabulary(), discount=0.6))
    (expected,) = torch.autograd.grad(sequence_divergence(student, teacher, 0.6), student)
    torch.testing.assert_close(expected_gradient(student, teacher, term), expected, atol=1e-12, rtol=1e-11)


def test_the_value_is_the_terms_own() -> None:
    student, teacher = tree(4), tree(5)
    inputs = inputs_of(student, teacher, (0, 2, 1))
    torch.testing.assert_close(ToGo(term=FullVocabulary())(inputs).loss_T, inputs.full_divergence_T)
    discounted = Discounted(term=FullVocabulary(), discount=0.5)(inputs).loss_T
    torch.testing.assert_close(discounted, inputs.full_divergence_T * torch.tensor([1.0, 0.5, 0.25]))


def test_later_sums_stay_in_their_rollout_in_any_order() -> None:
    lengths = [1, 4, 0, 3]
    rollout_index_T = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    position_T = torch.cat([torch.arange(length) for length in lengths])
    values_T = torch.arange(1.0, 9.0)
    expected = torch.tensor([0.0, 12.0, 9.0, 5.0, 0.0, 15.0, 8.0, 0.0])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for rows in (torch.arange(8), order):
        found = later_sums(values_T[rows], rollout_index_T[rows], position_T[rows])
        assert torch.equal(found, expected[rows])
    assert later_sums(values_T[:0], rollout_index_T[:0], position_T[:0]).numel() == 0


def test_positions_beyond_the_horizon_are_credited_to_nobody(make_models: Make) -> None:
    models = make_models(0)
    config = ObjectiveConfig(kind="sampled_token", credit=Credit.TO_GO, horizon={"start": 4})
    horizon_T = torch.arange(6) < 4
    whole = build_objective(config)(models.inputs(supervised_T=horizon_T, valid_T=horizon_T)).loss_sum
    (found,) = torch.autograd.grad(whole, models.student_logits_TV)
    student_TV, teacher_TV = models.student_logits_TV.detach().log_softmax(-1), models.teacher_logits_TV.log_softmax(-1)
    rows = torch.arange(6)
    ratio_T = (student_TV - teacher_TV)[rows, models.sampled_T]
    onehot = torch.nn.functional.one_hot(models.sampled_T, student_TV.shape[-1])
    for position in range(6):
        answers_for = ratio_T[position:4].sum()
        expected = answers_for * (onehot[position] - student_TV[position].exp())
        torch.testing.assert_close(found[position], expected, atol=1e-12, rtol=1e-11)
