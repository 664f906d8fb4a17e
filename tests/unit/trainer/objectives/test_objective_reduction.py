"""What holds for every objective: no dependence on how a batch is cut, nothing from invalid places, faults named."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.errors import InternalError, NonFiniteError
from services.trainer.objectives import Aggregation, Credit, GradientForm, ObjectiveConfig, Support, SupportWeight
from services.trainer.objectives.aggregation import denominator
from services.trainer.objectives.contract import LossInputs
from services.trainer.objectives.dispatch import build_objective

Make = Callable[..., Any]

CONFIGS = [
    *(ObjectiveConfig(support=support) for support in Support),
    *(ObjectiveConfig(gradient=GradientForm.POLICY, weight=weight) for weight in SupportWeight),
    ObjectiveConfig(gradient=GradientForm.POLICY, support=Support.NON_OVERLAP, renormalize=False),
    ObjectiveConfig(staleness_cap=1.5),
    ObjectiveConfig(kind="sampled_token"),
    ObjectiveConfig(kind="sampled_token", staleness_cap=1.5),
    ObjectiveConfig(divergence="forward_kl", position_discount=0.9),
    ObjectiveConfig(divergence="jsd", beta=0.3, tail="bucket", support="union"),
    ObjectiveConfig(tail="bucket", outcome={"weight": 0.5}, entropy_bonus=0.1),
    ObjectiveConfig(horizon={"start": 3}, outcome={"weight": 0.5, "region": "beyond_horizon"}),
    ObjectiveConfig(kind="grpo", staleness_cap=1.5),
    ObjectiveConfig(kind="full_vocabulary"),
    ObjectiveConfig(credit="to_go"),
    ObjectiveConfig(kind="sampled_token", credit="to_go", position_discount=0.9),
]


def _name(config: ObjectiveConfig) -> str:
    return "-".join(str(value) for value in config.model_dump(exclude_defaults=True).values()) or "default"


every_objective = pytest.mark.parametrize("config", CONFIGS, ids=_name)


def _inputs(models: Any, config: ObjectiveConfig, lengths: list[int] | None = None, **settings: Any) -> LossInputs:
    rollout_T = models.student_logits_TV.detach().log_softmax(-1)[torch.arange(len(models.sampled_T)), models.sampled_T]
    rollout_T = rollout_T - 0.4 * torch.sin(torch.arange(len(rollout_T)))
    counts = lengths or [len(models.sampled_T)]
    per_position = torch.repeat_interleave(torch.tensor(counts), torch.tensor(counts))
    position_T = torch.cat([torch.arange(count) for count in counts])
    fields = {
        "rollout_logprobs_T": rollout_T,
        "rollout_num_positions_T": per_position,
        "position_T": position_T,
        "rollout_index_T": torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
        "supervised_T": position_T < config.horizon.start if config.horizon else None,
        "advantage_T": torch.sin(per_position.double()),
    }
    return models.inputs(config.support, **(fields | settings))


def _rows(inputs: LossInputs, rows: Tensor) -> LossInputs:
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(LossInputs)}
    return LossInputs(**{name: value[rows] for name, value in fields.items() if isinstance(value, Tensor)})


def _splits(config: ObjectiveConfig, lengths: list[int]) -> list[list[Tensor]]:
    """Any rows in any micro-batch; only `to_go` looks at whole rollouts, which then stay together, in any order."""
    num = sum(lengths)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(1))
    if config.credit is Credit.LOCAL:
        return [list(order.split(sizes)) for sizes in ([5, 5, 5, 5, 4], [1] * num, [23, 1])]
    whole = torch.arange(num).split(lengths)
    return [list(whole), [whole[2], torch.cat([whole[3].flip(0), whole[1]]), whole[0]], [order]]


def _gradient(losses: list[Tensor], divisor: float, models: Any) -> Tensor:
    (gradient,) = torch.autograd.grad(sum(losses) / divisor, models.student_logits_TV, retain_graph=True)
    return gradient


@every_objective
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_any_split_and_order_gives_the_same_step(
    make_models: Make, config: ObjectiveConfig, dtype: torch.dtype, tolerance: float, aggregation: Aggregation
) -> None:
    lengths = [1, 7, 3, 13]
    models = make_models(0, num_positions=sum(lengths), dtype=dtype)
    config = config.model_copy(update={"aggregation": aggregation})
    objective, inputs = build_objective(config), _inputs(models, config, lengths)
    divisor = denominator(aggregation, lengths)
    whole = objective(inputs)
    expected = _gradient([whole.loss_sum], divisor, models)
    for split in _splits(config, lengths):
        parts = [objective(_rows(inputs, rows)) for rows in split]
        found = _gradient([part.loss_sum for part in parts], divisor, models)
        assert (found - expected).norm() <= tolerance * expected.norm()
        assert sum(part.num_positions for part in parts) == whole.num_positions
        for name, mean in whole.metrics.items():
            total = sum(part.metrics[name].total for part in parts)
            assert total == pytest.approx(mean.total, rel=10 * tolerance, abs=10 * tolerance)
            assert sum(part.metrics[name].count for part in parts) == pytest.approx(mean.count, rel=1e-5)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_the_mean_is_over_what_it_says(make_models: Make, aggregation: Aggregation) -> None:
    lengths = [1, 7, 3, 13]
    models = make_models(1, num_positions=sum(lengths))
    config = ObjectiveConfig(aggregation=aggregation)
    found = build_objective(config)(_inputs(models, config, lengths))
    losses = [part.tolist() for part in found.position_loss_T.split(lengths)]
    by_hand = {
        Aggregation.TOKEN_MEAN: sum(sum(part) for part in losses) / sum(lengths),
        Aggregation.SEQUENCE_MEAN: sum(sum(part) / len(part) for part in losses) / len(lengths),
    }[aggregation]
    assert found.loss_sum.item() / denominator(aggregation, lengths) == pytest.approx(by_hand, rel=1e-12)
    assert found.metrics["loss/objective"].value == pytest.approx(by_hand, rel=1e-12)


def test_rollouts_without_a_trained_position_do_not_count() -> None:
    assert denominator(Aggregation.SEQUENCE_MEAN, [3, 0, 2]) == 2
    assert denominator(Aggregation.TOKEN_MEAN, [3, 0, 2]) == 5


@every_objective
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nothing_of_an_invalid_position_or_an_unused_column_leaks(
    make_models: Make, config: ObjectiveConfig, poison: float
) -> None:
    models = make_models(2)
    valid_T = torch.tensor([True, False, True, True, False, True])
    objective, clean = build_objective(config), _inputs(models, config, valid_T=valid_T)
    expected = objective(clean)
    unused_TK = ~(clean.support_mask_TK & valid_T.unsqueeze(-1))
    masks = {
        "student_logprobs_TK": unused_TK,
        "teacher_logprobs_TK": unused_TK,
        "student_sampled_logprobs_T": ~valid_T,
        "teacher_sampled_logprobs_T": ~valid_T,
        "rollout_logprobs_T": ~valid_T,
        "student_outside_logprobs_T": ~valid_T,
        "student_entropy_T": ~valid_T,
        "full_divergence_T": ~valid_T,
        "advantage_T": ~valid_T,
    }
    # Multiplying instead of filling keeps a path for the gradient, along which 0 * NaN would come back.
    poisoned = {
        name: getattr(clean, name) * torch.ones_like(getattr(clean, name)).masked_fill(mask, poison)
        for name, mask in masks.items()
    }
    found = objective(dataclasses.replace(clean, **poisoned))
    torch.testing.assert_close(found.loss_sum, expected.loss_sum, atol=0, rtol=0)
    torch.testing.assert_close(found.position_loss_T, expected.position_loss_T, atol=0, rtol=0, equal_nan=True)
    leaves = [poisoned[name] for name in ("student_logprobs_TK", "student_sampled_logprobs_T")]
    for leaf, name in zip(leaves, ("student_logprobs_TK", "student_sampled_logprobs_T"), strict=True):
        (gradient,) = torch.autograd.grad(found.loss_sum, leaf, retain_graph=True, allow_unused=True)
        if gradient is not None:
            assert gradient.isfinite().all() and not gradient[masks[name]].any()
    assert found.position_loss_T.isnan().tolist() == (~valid_T).tolist()
    assert found.num_positions == 4


@every_objective
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_missing_number_that_would_train_is_named(make_models: Make, config: ObjectiveConfig, bad: float) -> None:
    models = make_models(3)
    objective, inputs = build_objective(config), _inputs(models, config)
    needs, index, where = objective.needs, (2,), "position 2 of the micro-batch"
    if needs.support:
        column = int(inputs.support_mask_TK[2].nonzero()[-1])
        name, index, what = "teacher_logprobs_TK", (2, column), "teacher log-prob"
        where += rf", support column {column} \(token id {int(inputs.support_ids_TK[2, column])}\)"
    elif needs.teacher_sampled:
        name, what = "teacher_sampled_logprobs_T", "teacher log-prob of the sampled token"
    elif needs.full_vocabulary:
        name, what = "full_divergence_T", "divergence over the vocabulary"
    else:
        name, what = "advantage_T", "advantage"
    values = getattr(inputs, name).clone()
    values[index] = bad
    with pytest.raises(NonFiniteError, match=f"^{what} at {where} is {bad}: the step was not applied$"):
        objective(dataclasses.replace(inputs, **{name: values}))


@every_objective
def test_a_student_that_blew_up_is_named_too(make_models: Make, config: ObjectiveConfig) -> None:
    models = make_models(4)
    objective, inputs = build_objective(config), _inputs(models, config)
    broken = {
        name: getattr(inputs, name).detach().clone().index_fill(0, torch.tensor([3]), torch.nan)
        for name in ("student_logprobs_TK", "student_sampled_logprobs_T", "full_divergence_T")
    }
    with pytest.raises(NonFiniteError, match=r"(student log-prob|divergence) .*position 3"):
        objective(dataclasses.replace(inputs, **broken))


@every_objective
def test_what_was_left_out_is_named(make_models: Make, config: ObjectiveConfig) -> None:
    models = make_models(5)
    objective = build_objective(config)
    with pytest.raises(InternalError, match="the objective needs LossInputs"):
        objective(LossInputs(valid_T=models.inputs().valid_T, position_T=torch.arange(6)))


def test_what_lies_beyond_the_horizon_has_no_teacher(make_models: Make) -> None:
    """Neither its numbers nor their absence reach the signal; the outcome trains there all the same."""
    models = make_models(7)
    config = ObjectiveConfig(horizon={"start": 3}, outcome={"weight": 2.0, "region": "beyond_horizon"})
    inputs = _inputs(models, config)
    silent = inputs.teacher_logprobs_TK.index_fill(0, torch.arange(3, 6), torch.nan)
    found = build_objective(config)(dataclasses.replace(inputs, teacher_logprobs_TK=silent))
    (gradient,) = torch.autograd.grad(found.loss_sum, models.student_logits_TV)
    plain = ObjectiveConfig()
    whole = build_objective(plain)(_inputs(models, plain))
    (expected,) = torch.autograd.grad(whole.loss_sum, models.student_logits_TV)
    torch.testing.assert_close(gradient[:3], expected[:3], atol=1e-12, rtol=1e-12)
    onehot = torch.nn.functional.one_hot(models.sampled_T, 9) - models.student_logits_TV.detach().softmax(-1)
    advantage = inputs.advantage_T.unsqueeze(-1)
    torch.testing.assert_close(gradient[3:], (-2.0 * advantage * onehot)[3:], atol=1e-12, rtol=1e-12)
    assert (found.metrics["loss/signal"].count, found.metrics["loss/outcome"].count) == (3, 3)
    assert found.num_positions == 6


def test_a_micro_batch_without_a_valid_position_is_zero(make_models: Make) -> None:
    models = make_models(6)
    config = ObjectiveConfig()
    found = build_objective(config)(_inputs(models, config, valid_T=torch.zeros(6, dtype=torch.bool)))
    assert found.loss_sum.item() == 0.0 and found.num_positions == 0
    assert found.metrics["loss/objective"].count == 0
