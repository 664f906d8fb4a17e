"""The whole-vocabulary objective: eq 4 by brute force, what it refuses, and how it joins the others."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from opd.errors import InternalError, NonFiniteError
from services.trainer.objectives import Aggregation, ObjectiveConfig
from services.trainer.objectives.aggregation import Reduction
from services.trainer.objectives.contract import Needs
from services.trainer.objectives.dispatch import build_objective
from services.trainer.objectives.full_vocabulary import FullVocabulary
from services.trainer.objectives.objective import Objective, WeightedTerm
from tests.unit.trainer.objectives.conftest import TinyModels

MakeModels = Callable[..., TinyModels]


def objective() -> Objective:
    return Objective(terms=(WeightedTerm(name="signal", term=FullVocabulary()),))


def test_the_loss_is_eq_4_and_its_gradient_the_exact_one(make_models: MakeModels) -> None:
    models = make_models()
    output = objective()(models.inputs())
    output.loss_sum.backward()
    for row in range(len(models.sampled_T)):
        student = [math.exp(value) for value in models.student_logits_TV[row].tolist()]
        teacher = [math.exp(value) for value in models.teacher_logits_TV[row].tolist()]
        p = [value / math.fsum(student) for value in student]
        q = [value / math.fsum(teacher) for value in teacher]
        kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert output.position_loss_T[row].item() == pytest.approx(kl, rel=1e-12)
        expected = [a * (math.log(a / b) - kl) for a, b in zip(p, q, strict=True)]
        assert models.student_logits_TV.grad[row].tolist() == pytest.approx(expected, abs=1e-13)


def test_positions_that_do_not_train_reach_neither_loss_nor_gradient(make_models: MakeModels) -> None:
    models = make_models()
    inputs = models.inputs()
    broken = inputs.full_divergence_T.masked_fill(torch.arange(6) == 2, torch.nan)
    valid = torch.arange(6) != 2
    output = objective()(dataclasses.replace(inputs, full_divergence_T=broken, valid_T=valid))
    assert output.num_positions == 5 and torch.isfinite(output.loss_sum)
    with pytest.raises(NonFiniteError, match="divergence over the vocabulary at position 2 of the micro-batch is nan"):
        objective()(dataclasses.replace(inputs, full_divergence_T=broken))
    with pytest.raises(InternalError, match=r"needs LossInputs\.full_divergence_T"):
        objective()(dataclasses.replace(inputs, full_divergence_T=None))


def test_what_it_needs_depends_on_staleness_alone() -> None:
    plain = build_objective(ObjectiveConfig(kind="full_vocabulary"))
    assert plain.needs == Needs(full_vocabulary=True)
    config = ObjectiveConfig(kind="full_vocabulary", staleness_cap=2.0, aggregation="sequence_mean")
    built = build_objective(config)
    assert built.reduction == Reduction(aggregation=Aggregation.SEQUENCE_MEAN, staleness_cap=2.0)
    assert built.needs == Needs(full_vocabulary=True, sampled=True)
    for kind in ("top_k", "sampled_token", "grpo"):
        assert not build_objective(ObjectiveConfig(kind=kind)).needs.full_vocabulary


@pytest.mark.parametrize(
    "setting",
    [{"support": "union"}, {"gradient": "policy"}, {"renormalize": False}, {"weight": "teacher"}, {"tail": "bucket"}],
)
def test_settings_of_a_support_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="kind=full_vocabulary looks at every token and has no support"):
        ObjectiveConfig(kind="full_vocabulary", **setting)
