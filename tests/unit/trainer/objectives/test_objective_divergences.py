"""Forward KL and Jensen-Shannon on a support, and the tail as one more outcome: plain sums and finite differences."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd.errors import NonFiniteError
from opd.ops import MASKED_LOGIT
from services.trainer.objectives import Support, Tail
from services.trainer.objectives.top_k import TEACHER_TAIL_RESOLUTION, TopK, teacher_outside_logprobs
from tests.unit.trainer.objectives.conftest import NUM_IDS, TinyModels

Make = Callable[..., TinyModels]
BETAS = [0.0, 0.4, 1.0]


def outcomes(models: TinyModels, support: Support, position: int, tail: Tail) -> tuple[list[float], list[float]]:
    """Both models' probabilities of what is told apart at a position, from the whole vocabulary."""
    sets = set(models.student_ids_Tk[position].tolist()), set(models.teacher_ids_Tk[position].tolist())
    ids = {
        Support.STUDENT: sets[0],
        Support.TEACHER: sets[1],
        Support.OVERLAP: sets[0] & sets[1],
        Support.NON_OVERLAP: sets[0] ^ sets[1],
        Support.UNION: sets[0] | sets[1],
    }[support]
    found = []
    for logits_TV in (models.student_logits_TV.detach(), models.teacher_logits_TV):
        probs = logits_TV[position].softmax(-1).tolist()
        inside = [probs[v] for v in sorted(ids)]
        if tail is Tail.BUCKET and len(ids) < NUM_IDS:
            inside.append(math.fsum(probs[v] for v in range(NUM_IDS) if v not in ids))
        found.append([p / math.fsum(inside) for p in inside])
    return found[0], found[1]


def divergence(p: list[float], q: list[float], beta: float) -> float:
    if beta in (0.0, 1.0):
        pairs = zip(p, q, strict=True) if beta else zip(q, p, strict=True)
        return math.fsum(a * math.log(a / b) for a, b in pairs)
    m = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
    terms = [beta * b * math.log(b / c) + (1 - beta) * a * math.log(a / c) for a, b, c in zip(p, q, m, strict=True)]
    return math.fsum(terms)


@pytest.mark.parametrize("tail", list(Tail))
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("support", list(Support))
def test_value_and_gradient_follow_the_definition(make_models: Make, support: Support, beta: float, tail: Tail) -> None:
    models = make_models(1)
    term = TopK(support=support, beta=beta, tail=tail)
    found = term(models.inputs(support)).loss_T
    expected = [divergence(*outcomes(models, support, t, tail), beta) for t in range(len(models.sampled_T))]
    torch.testing.assert_close(found.tolist(), expected, atol=1e-12, rtol=1e-11)

    def loss(logits_TV: Tensor) -> Tensor:
        # The support stays the rollout's own while the logits move: S is a constant of the loss.
        return term(models.inputs(support, logits_TV=logits_TV)).loss_T

    assert torch.autograd.gradcheck(loss, models.student_logits_TV)


@pytest.mark.parametrize("tail", list(Tail))
@pytest.mark.parametrize("beta", BETAS)
def test_on_the_whole_vocabulary_every_form_is_the_full_divergence(make_models: Make, beta: float, tail: Tail) -> None:
    """Nothing is outside then, and the bucket must not invent a mass."""
    models = make_models(2, score_top_k=NUM_IDS)
    found = TopK(beta=beta, tail=tail)(models.inputs())
    p, q = models.student_logits_TV.softmax(-1).tolist(), models.teacher_logits_TV.softmax(-1).tolist()
    expected = [divergence(a, b, beta) for a, b in zip(p, q, strict=True)]
    torch.testing.assert_close(found.loss_T.tolist(), expected, atol=1e-12, rtol=1e-11)
    (gradient,) = torch.autograd.grad(found.loss_T.sum(), models.student_logits_TV)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("tail", list(Tail))
@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_equal_to_the_student_teaches_nothing(make_models: Make, beta: float, tail: Tail) -> None:
    models = make_models(3)
    models.teacher_logits_TV.copy_(models.student_logits_TV.detach() - 2.0)
    loss_T = TopK(beta=beta, tail=tail)(models.inputs()).loss_T
    (gradient,) = torch.autograd.grad(loss_T.sum(), models.student_logits_TV)
    assert loss_T.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


def test_a_bucket_trains_at_top_1_where_the_dropped_tail_cannot(make_models: Make) -> None:
    models = make_models(4, score_top_k=1)
    norms = {}
    for tail in Tail:
        loss_T = TopK(tail=tail)(models.inputs()).loss_T
        (gradient,) = torch.autograd.grad(loss_T.sum(), models.student_logits_TV)
        norms[tail] = gradient.norm().item()
    assert norms[Tail.DROP] == 0.0 and norms[Tail.BUCKET] > 0.1


def test_an_empty_support_with_a_bucket_is_one_sure_outcome(make_models: Make) -> None:
    models = make_models(5)
    inputs = models.inputs()
    nothing = torch.zeros_like(inputs.support_mask_TK)
    empty = dataclasses.replace(
        inputs, support_mask_TK=nothing, student_outside_logprobs_T=inputs.student_outside_logprobs_T * 0.0
    )
    assert not TopK(tail=Tail.BUCKET)(empty).loss_T.any()


def test_the_teachers_tail_is_as_exact_as_its_log_probs_and_never_zero() -> None:
    """Against the logits themselves: float32 replies, from tails that are most of the mass to none at all."""
    generator = torch.Generator().manual_seed(6)
    scales = torch.linspace(0.5, 12.0, 200, dtype=torch.float64)[:, None]
    logits_TV = torch.randn(200, 500, generator=generator, dtype=torch.float64) * scales
    exact_TV = logits_TV.log_softmax(-1)
    logprobs_TK, ids_TK = exact_TV.topk(8, dim=-1)
    outside_T = exact_TV.scatter(1, ids_TK, MASKED_LOGIT).logsumexp(-1).exp()
    mask_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    found_T, is_floored_T = teacher_outside_logprobs(logprobs_TK.float(), mask_TK)
    assert (found_T.double().exp() - outside_T.clamp_min(TEACHER_TAIL_RESOLUTION)).abs().max() < 1e-6
    assert 0 < is_floored_T.sum() < 100 and torch.equal(is_floored_T, outside_T < TEACHER_TAIL_RESOLUTION)
    assert found_T.isfinite().all()


def test_the_share_of_raised_tails_is_reported(make_models: Make) -> None:
    models = make_models(7)
    models.teacher_logits_TV[:2].mul_(40.0)
    counted = TopK(support=Support.TEACHER, tail=Tail.BUCKET)(models.inputs(Support.TEACHER)).counted
    assert counted["loss/teacher_tail_floored_fraction"].item() == 2


def test_a_mass_outside_that_is_no_number_is_named(make_models: Make) -> None:
    inputs = make_models(8).inputs()
    outside_T = inputs.student_outside_logprobs_T.detach().clone()
    outside_T[3] = -torch.inf
    with pytest.raises(NonFiniteError, match=r"of what is outside the support at position 3 .* is -inf"):
        TopK(tail=Tail.BUCKET)(dataclasses.replace(inputs, student_outside_logprobs_T=outside_T))
