"""Loss, gradient norm and coherence against a plain float64 computation."""

import copy

import numpy as np
import pytest
import torch

from services.trainer.batch import ScoredRollout
from services.trainer.loss import DistillLoss
from services.trainer.objectives.config import Aggregation, ObjectiveConfig
from services.trainer.objectives.dispatch import build_objective
from services.trainer.recipes.preflight.gradient import batch_gradient
from services.trainer.student import Student
from tests.unit.trainer.recipes.scored_rollouts import K, scored
from tests.unit.trainer.tiny_training import NUM_IDS, tiny_model


def plain_gradient(model: torch.nn.Module, item: ScoredRollout) -> tuple[float, torch.Tensor]:
    """Sum over positions of eq 5, and its gradient in one vector, from a float64 forward pass over everything."""
    rollout, wide = item.rollout, copy.deepcopy(model).double()
    ids = torch.from_numpy(np.concatenate([rollout.prompt_token_ids, rollout.response_token_ids]).astype(np.int64))
    logits_RV = wide(input_ids=ids[None]).logits[0, rollout.prompt_token_ids.size - 1 : -1]
    support_RK = torch.from_numpy(rollout.topk_token_ids.astype(np.int64))
    student_RK = logits_RV.gather(1, support_RK).log_softmax(dim=-1)
    assert item.scores.candidate_logprobs is not None
    teacher_RK = torch.from_numpy(item.scores.candidate_logprobs).double().log_softmax(dim=-1)
    loss = (student_RK.exp() * (student_RK - teacher_RK)).sum()
    loss.backward()
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in wide.parameters()]
    return float(loss.detach()), torch.cat([gradient.flatten() for gradient in flat])


def test_it_is_what_a_first_step_would_see() -> None:
    model, teacher = tiny_model(1), tiny_model(2)
    lengths = (5, 3, 8, 2, 6)
    generator = np.random.default_rng(0)
    items = [
        scored(model, teacher, [2 + i, 9, 4], generator.integers(2, NUM_IDS, size=length).tolist())
        for i, length in enumerate(lengths)
    ]
    config = ObjectiveConfig(score_top_k=K)
    student = Student(model, num_defined_ids=NUM_IDS)
    found = batch_gradient(
        student,
        DistillLoss(student, build_objective(config), config),
        items,
        aggregation=Aggregation.TOKEN_MEAN,
        max_micro_batch_tokens=20,
        num_probe_rollouts=3,
    )
    plain = [plain_gradient(model, item) for item in items]
    total = sum(lengths)
    assert found.loss == pytest.approx(sum(loss for loss, _ in plain) / total, rel=1e-4)
    assert found.grad_norm == pytest.approx(float(sum(vector for _, vector in plain).norm()) / total, rel=1e-4)
    probe = [vector / length for (_, vector), length in zip(plain[:3], lengths, strict=False)]
    expected = float(sum(probe).norm()) / sum(float(vector.norm()) for vector in probe)
    assert found.coherence == pytest.approx(expected, rel=1e-4)
    assert 0 < expected < 1
    assert found.unrelated_coherence == pytest.approx(3**-0.5)
    assert (found.num_rollouts, found.num_probe_rollouts) == (5, 3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_equal_rollouts_are_wholly_coherent_and_a_perfect_teacher_gives_no_gradient() -> None:
    model = tiny_model(1)
    config = ObjectiveConfig(score_top_k=K)
    student = Student(model, num_defined_ids=NUM_IDS)
    loss = DistillLoss(student, build_objective(config), config)

    def found(teacher: object) -> tuple[float, float | None]:
        items = [scored(model, teacher, [5, 9, 4], [7, 3, 8])] * 4
        seen = batch_gradient(
            student, loss, items, aggregation=Aggregation.TOKEN_MEAN, max_micro_batch_tokens=64, num_probe_rollouts=4
        )
        return seen.grad_norm, seen.coherence

    assert found(tiny_model(2))[1] == pytest.approx(1.0, rel=1e-5)
    assert found(model)[0] < 1e-4
