"""Where batch, student and objective meet: a bad number is named by its rollout before it reaches any gradient."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from opd.errors import InternalError, NonFiniteError
from opd.ops import OutputHead
from services.trainer.batch import ScoredRollout, build_batch
from services.trainer.loss import DistillLoss
from services.trainer.objectives.config import ObjectiveConfig
from services.trainer.objectives.contract import LossInputs, Needs, PositionLosses
from services.trainer.objectives.dispatch import build_objective
from services.trainer.objectives.objective import Objective, WeightedTerm
from services.trainer.student import Student, output_head
from tests.unit.trainer.tiny_training import NUM_IDS, Setup, in_dtype, tiny_model


@pytest.fixture(scope="module")
def scored() -> list[ScoredRollout]:
    """Rollouts with everything a term may read; the teacher's hidden states are those of a model of its own."""
    record = Setup(num_steps=1, prompts_per_step=2, max_response_tokens=6).loop().run_step()
    teacher = tiny_model(2)
    return [
        dataclasses.replace(
            item, advantage=0.5, scores=dataclasses.replace(item.scores, hidden_states=hidden(teacher, item))
        )
        for item in record.scored
    ]


def hidden(teacher: Any, item: ScoredRollout) -> np.ndarray:
    ids = np.concatenate([item.rollout.prompt_token_ids, item.rollout.response_token_ids]).astype(np.int64)
    with torch.no_grad():
        states = teacher.base_model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0]
    return states[item.rollout.prompt_token_ids.size - 1 : -1].numpy()


def loss_of(config: ObjectiveConfig, model: Any = None) -> DistillLoss:
    student = Student(model if model is not None else tiny_model(1), num_defined_ids=NUM_IDS)
    return DistillLoss(student, build_objective(config), config, lambda: output_head(tiny_model(2)))


def spoilt(items: list[ScoredRollout], name: str, bad: float) -> tuple[list[ScoredRollout], str, int]:
    """The last position of the second rollout is no number in one of its columns."""
    values = getattr(items[1].scores, name).copy()
    position = len(values) - 1
    values[position] = bad
    item = dataclasses.replace(items[1], scores=dataclasses.replace(items[1].scores, **{name: values}))
    return [items[0], item, *items[2:]], item.rollout.rollout_id, position


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "candidate_logprobs"),
        ({"gradient": "policy", "support": "union"}, "topk_logprobs"),
        ({"divergence": "jsd", "tail": "bucket"}, "candidate_logprobs"),
        ({"kind": "sampled_token", "credit": "to_go"}, "sampled_logprobs"),
        ({"kind": "full_vocabulary", "divergence": "forward_kl"}, "hidden_states"),
    ],
    ids=["exact", "policy", "bucket", "sampled", "full"],
)
def test_a_teachers_bad_number_is_named_by_its_rollout(
    scored: list[ScoredRollout], settings: dict[str, str], name: str, bad: float
) -> None:
    items, rollout_id, position = spoilt(scored, name, bad)
    model = tiny_model(1)
    loss = loss_of(ObjectiveConfig(score_top_k=6, **settings), model)
    with pytest.raises(NonFiniteError, match=rf"at response position {position} of rollout {rollout_id}[ ,]"):
        loss(build_batch(items))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_advantage_that_is_no_number_is_named_by_its_rollout(scored: list[ScoredRollout]) -> None:
    items = [scored[0], dataclasses.replace(scored[1], advantage=float("nan"))]
    named = rf"^advantage at response position 0 of rollout {scored[1].rollout.rollout_id} is nan"
    with pytest.raises(NonFiniteError, match=named):
        loss_of(ObjectiveConfig(kind="grpo"))(build_batch(items))


@pytest.mark.parametrize("kind", ["top_k", "sampled_token", "full_vocabulary", "grpo"])
def test_a_student_that_blew_up_is_named_by_a_rollout(scored: list[ScoredRollout], kind: str) -> None:
    model = tiny_model(1)
    loss = loss_of(ObjectiveConfig(kind=kind, score_top_k=6), model)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^the student's log-probs at response position 0 of rollout run\.0\.\d"):
        loss(build_batch(scored))


class Steep:
    """Worth 0 everywhere, with a gradient that is no number at one position."""

    needs = Needs(sampled=True)

    def __init__(self, row: int) -> None:
        self._row = row

    def __call__(self, inputs: LossInputs) -> PositionLosses:
        student_T = inputs.require("student_sampled_logprobs_T")
        steep = (student_T[self._row] - student_T[self._row].detach()).abs().sqrt()
        return PositionLosses(loss_T=torch.zeros_like(student_T).index_fill(0, torch.tensor([self._row]), 1.0) * steep)


def test_a_gradient_that_is_no_number_is_named_though_its_loss_is_one(scored: list[ScoredRollout]) -> None:
    row = scored[0].num_response_tokens + 1
    objective = Objective(terms=(WeightedTerm(name="steep", term=Steep(row)),))
    loss = DistillLoss(Student(tiny_model(1), num_defined_ids=NUM_IDS), objective, ObjectiveConfig(kind="grpo"))
    output = loss(build_batch(scored))
    assert output.loss_sum.item() == 0.0
    named = rf"^the gradient at response position 1 of rollout {scored[1].rollout.rollout_id} is not finite"
    with pytest.raises(NonFiniteError, match=named):
        output.loss_sum.backward()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({}, "candidate_logprobs"),
        ({"support": "teacher"}, "topk_token_ids"),
        ({"kind": "sampled_token"}, "sampled_logprobs"),
        ({"kind": "full_vocabulary"}, "hidden_states"),
    ],
    ids=["candidates", "top-k", "sampled", "hidden"],
)
def test_what_a_loss_needs_and_was_not_given_is_our_own_fault(
    scored: list[ScoredRollout], settings: dict[str, str], field: str
) -> None:
    items = [dataclasses.replace(scored[0], scores=dataclasses.replace(scored[0].scores, **{field: None}))]
    with pytest.raises(InternalError, match="need"):
        loss_of(ObjectiveConfig(score_top_k=6, **settings))(build_batch(items))


CONFIGS = [
    ObjectiveConfig(score_top_k=6, outcome={"weight": 0.5}),
    ObjectiveConfig(score_top_k=6, horizon={"start": 2}, outcome={"weight": 0.5, "region": "beyond_horizon"}),
    ObjectiveConfig(kind="grpo", entropy_bonus=0.1, aggregation="sequence_mean"),
    ObjectiveConfig(kind="full_vocabulary", divergence="jsd", position_discount=0.9),
    ObjectiveConfig(kind="sampled_token", credit="to_go", aggregation="sequence_mean"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["outcome", "horizon", "grpo", "full", "to-go"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_no_step_depends_on_its_micro_batches(
    scored: list[ScoredRollout], config: ObjectiveConfig, dtype: torch.dtype, tolerance: float
) -> None:
    items = [dataclasses.replace(item, advantage=0.3 * row - 0.5) for row, item in enumerate(scored)]
    if config.horizon:
        items = [dataclasses.replace(item, supervised_tokens=config.horizon.start) for item in items]
    gradients = []
    for max_tokens, order in ((10_000, 1), (1, -1), (20, 1)):
        model = in_dtype(tiny_model(1), dtype)
        setup = Setup(student_model=model, objective=config, max_micro_batch_tokens=max_tokens)
        setup.loss = loss_of(config, model)
        gradients.append(setup.accumulate(items[::order]))
    for split in gradients[1:]:
        assert (split - gradients[0]).norm() <= tolerance * gradients[0].norm()
    assert gradients[0].norm() > 1e-3


SPARSE = {
    "reverse": ObjectiveConfig(score_top_k=6),
    "forward": ObjectiveConfig(score_top_k=6, divergence="forward_kl", support="teacher"),
    "jsd": ObjectiveConfig(score_top_k=6, divergence="jsd", beta=0.3, support="union"),
    "overlap": ObjectiveConfig(score_top_k=6, support="overlap", position_discount=0.9),
    "non-overlap": ObjectiveConfig(score_top_k=6, support="non_overlap", aggregation="sequence_mean"),
    "tempered": ObjectiveConfig(score_top_k=6, student_temperature=0.7),
}


@pytest.mark.parametrize("config", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_the_exact_form_on_a_support_equals_that_of_normalised_log_probs(
    scored: list[ScoredRollout], config: ObjectiveConfig, is_tied: bool
) -> None:
    """The sparse head leaves the normaliser out; in float64 neither loss nor gradient may notice."""
    found, batch = [], build_batch(scored)
    # Log-probs that are rounded to fp32 do not quite add up to 1, so that a normaliser would not quite cancel.
    columns = ("teacher_support_logprobs_TK", "teacher_topk_logprobs_Tk")
    batch = dataclasses.replace(batch, **{name: getattr(batch, name).double() for name in columns})
    for normalizer in (False, True):
        model = tiny_model(1, tie_word_embeddings=is_tied).double()
        student = Student(model, num_defined_ids=NUM_IDS, temperature=config.student_temperature or 1.0)
        loss = DistillLoss(student, build_objective(config), config)
        assert not loss._needs.whole_vocabulary
        loss._needs = dataclasses.replace(loss._needs, normalizer=normalizer)
        output = loss(batch)
        output.loss_sum.backward()
        found.append((output, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
    (sparse, gradient), (dense, expected) = found
    assert sparse.loss_sum.item() == pytest.approx(dense.loss_sum.item(), rel=1e-10)
    assert sparse.metrics.keys() == dense.metrics.keys()
    assert (gradient - expected).norm() <= 1e-10 * expected.norm() and expected.norm() > 1e-3


NEED_THE_NORMALISER = {
    "policy": ObjectiveConfig(score_top_k=6, gradient="policy"),
    "bucket": ObjectiveConfig(score_top_k=6, tail="bucket"),
    "outcome": ObjectiveConfig(score_top_k=6, outcome={"weight": 0.5}),
    "entropy": ObjectiveConfig(score_top_k=6, entropy_bonus=0.1),
    "stale": ObjectiveConfig(score_top_k=6, staleness_cap=2.0),
    "sampled": ObjectiveConfig(kind="sampled_token"),
}


@pytest.mark.parametrize("config", NEED_THE_NORMALISER.values(), ids=NEED_THE_NORMALISER)
def test_what_has_a_normaliser_in_it_runs_over_all_ids(config: ObjectiveConfig) -> None:
    assert build_objective(config).needs.whole_vocabulary


def test_a_step_on_a_support_never_runs_the_whole_head(
    scored: list[ScoredRollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, policy = (loss_of(ObjectiveConfig(score_top_k=6, gradient=form)) for form in ("exact", "policy"))

    def refuse(head: OutputHead, hidden_TH: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the whole head was run")

    monkeypatch.setattr(OutputHead, "logits", refuse)
    loss(build_batch(scored)).loss_sum.backward()
    with pytest.raises(AssertionError, match="the whole head"):
        policy(build_batch(scored))
