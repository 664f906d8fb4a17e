"""Everything a real step logs, against both models run again in float64 over the whole vocabulary, by plain loops.

Nothing of the diagnostics, the rollout engine or the loss is used here: from the token ids of the rollouts alone, every
distribution is computed anew and every definition of the contract is written out.
"""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from opd.types import FinishReason
from services.trainer.diagnostics import POSITION_EDGES, StepSummary
from services.trainer.loop import StepRecord
from services.trainer.objectives.config import SupportWeight
from services.trainer.step_metrics import StepMetrics
from tests.unit.trainer.tiny_training import NUM_IDS, Setup

K = 6
BY_POSITION = ("overlap_ratio", "overlap_advantage", "entropy_student", "entropy_teacher", "entropy_gap")


def logprobs(model: Any, rollout: Any) -> torch.Tensor:
    """[R, V] in float64, with gradient where the model's parameters have one."""
    ids = torch.tensor([*rollout.prompt_token_ids.tolist(), *rollout.response_token_ids.tolist()])
    logits = model(input_ids=ids[None]).logits[0, len(rollout.prompt_token_ids) - 1 : -1]
    return logits.log_softmax(dim=-1)


def top(row: list[float]) -> list[int]:
    return sorted(range(NUM_IDS), key=lambda v: (-row[v], v))[:K]


def holds_99(row: list[float], ids: list[int]) -> set[int]:
    chosen: set[int] = set()
    for v in ids:
        if sum(math.exp(row[u]) for u in chosen) >= 0.99:
            break
        chosen.add(v)
    return chosen


def shares(row: list[float], ids: list[int]) -> dict[int, float]:
    mass = sum(math.exp(row[v]) for v in ids)
    return {v: math.exp(row[v]) / mass for v in ids}


def entropy(row: list[float]) -> float:
    return -sum(math.exp(x) * x for x in row)


def at_position(student: list[float], teacher: list[float], sampled: int) -> dict[str, float]:
    """The definitions, one after the other; a quantity that does not exist at a position is left out."""
    mine, theirs = top(student), top(teacher)
    common = [v for v in mine if v in theirs]
    ours, ours_teacher = shares(student, mine), shares(teacher, mine)
    extreme = max(mine, key=lambda v: abs(math.exp(student[v]) * (teacher[v] - student[v])))
    gap = math.exp(student[extreme]) - math.exp(teacher[extreme])
    mine99, theirs99 = holds_99(student, mine), holds_99(teacher, theirs)
    found = {
        "distill/overlap_ratio": len(common) / K,
        "distill/empty_overlap_fraction": float(not common),
        "distill/overlap_mass_student": sum(math.exp(student[v]) for v in common),
        "distill/overlap_mass_teacher": sum(math.exp(teacher[v]) for v in common),
        "distill/mass99_overlap": len(mine99 & theirs99) / len(mine99 | theirs99),
        "distill/entropy_student": entropy(student),
        "distill/entropy_teacher": entropy(teacher),
        "distill/entropy_gap": abs(entropy(student) - entropy(teacher)),
        "distill/extreme_prob_gap": gap,
        "distill/extreme_prob_gap_abs": abs(gap),
        "loss/reverse_kl": sum(ours[v] * math.log(ours[v] / ours_teacher[v]) for v in mine),
        "rollout/sampled_reverse_kl": student[sampled] - teacher[sampled],
    }
    if common:
        p, q = shares(student, common), shares(teacher, common)
        terms = [p[v] * (math.log(q[v]) - math.log(p[v])) for v in common]
        found |= {
            "distill/overlap_advantage": sum(terms) / len(common),
            "distill/overlap_advantage_sum": sum(terms),
        }
    return found


@pytest.fixture(scope="module")
def world() -> tuple[StepRecord, StepSummary, Any, Any]:
    """A step, what is logged of it, and both models in float64 as they were when it was sampled."""
    setup = Setup(num_steps=1, max_response_tokens=48, prompts_per_step=5)
    student, teacher = copy.deepcopy(setup.student_model).double(), copy.deepcopy(setup.teacher_model).double()
    record = setup.loop().run_step()
    return record, StepMetrics(weight=SupportWeight.STUDENT, decode=None).summarize(record), student, teacher


def all_positions(world: tuple[StepRecord, StepSummary, Any, Any]) -> list[tuple[int, int, dict[str, float]]]:
    """Rollout, position and its metrics."""
    record, _, student, teacher = world
    found = []
    with torch.no_grad():
        for index, item in enumerate(record.scored):
            rows = [logprobs(model, item.rollout).tolist() for model in (student, teacher)]
            sampled = item.rollout.response_token_ids.tolist()
            for position, (mine, theirs, token) in enumerate(zip(*rows, sampled, strict=True)):
                found.append((index, position, at_position(mine, theirs, token)))
    return found


def test_every_mean_over_positions(world: tuple[StepRecord, StepSummary, Any, Any]) -> None:
    values, positions = world[1].values, all_positions(world)
    names = sorted({name for _, _, metrics in positions for name in metrics})
    assert len(names) == 14 and len(positions) == values["rollout/response_tokens"]
    for name in names:
        column = [metrics[name] for _, _, metrics in positions if name in metrics]
        assert values[name] == pytest.approx(math.fsum(column) / len(column), rel=2e-5, abs=2e-6), name


def test_every_bucket_with_its_count(world: tuple[StepRecord, StepSummary, Any, Any]) -> None:
    positions, arrays = all_positions(world), world[1].arrays
    bounds = [*POSITION_EDGES, math.inf]
    filled = 0
    for name in (f"distill/{short}" for short in BY_POSITION):
        for bucket, (low, high) in enumerate(pairwise(bounds)):
            column = [m[name] for _, position, m in positions if low <= position < high and name in m]
            assert arrays[f"{name}/by_position/count"][bucket] == len(column)
            if column:
                expected = math.fsum(column) / len(column)
                assert arrays[f"{name}/by_position"][bucket] == pytest.approx(expected, rel=2e-5, abs=2e-6)
                filled += 1
            else:
                assert math.isnan(arrays[f"{name}/by_position"][bucket])
    assert filled == 3 * len(BY_POSITION)


def test_every_mean_over_rollouts(world: tuple[StepRecord, StepSummary, Any, Any]) -> None:
    record, summary, student, teacher = world
    positions, scored = all_positions(world), record.scored
    key = "rollout/sampled_reverse_kl"
    gaps = {index: [m[key] for owner, _, m in positions if owner == index] for index in range(len(scored))}
    rewards = [-math.fsum(gaps[index]) / len(gaps[index]) for index in gaps]
    assert summary.values["rollout/teacher_reward"] == pytest.approx(sum(rewards) / len(rewards), rel=2e-5)
    lengths = [len(item.rollout.response_token_ids) for item in scored]
    assert summary.values["rollout/response_length"] == sum(lengths) / len(lengths)
    cut = [item.rollout.finish_reason is FinishReason.LENGTH for item in scored]
    assert summary.values["rollout/truncated_fraction"] == sum(cut) / len(cut)
    ended = [item.rollout for item, is_cut in zip(scored, cut, strict=True) if not is_cut]
    assert ended, "some response must end by itself"
    with torch.no_grad():
        for name, model in (("student", student), ("teacher", teacher)):
            ends = [logprobs(model, rollout)[-1, rollout.response_token_ids[-1]].item() for rollout in ended]
            assert summary.values[f"rollout/eos_logprob_{name}"] == pytest.approx(sum(ends) / len(ends), rel=2e-5)


def test_loss_and_gradient_norm_before_clipping(world: tuple[StepRecord, StepSummary, Any, Any]) -> None:
    """Eq 5 with its own autograd: the mean over all positions of KL(student || teacher) on the student's top-k."""
    record, summary, student, teacher = world
    losses = []
    for item in record.scored:
        mine = logprobs(student, item.rollout)
        with torch.no_grad():
            theirs = logprobs(teacher, item.rollout)
        support = torch.tensor([top(row) for row in mine.tolist()])
        p, q = (rows.gather(1, support).log_softmax(dim=-1) for rows in (mine, theirs))
        losses.append((p.exp() * (p - q)).sum(dim=-1))
    loss = torch.cat(losses).mean()
    student.zero_grad()
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in student.parameters() if p.grad is not None))
    assert summary.values["loss/objective"] == pytest.approx(loss.item(), rel=2e-5)
    assert norm > 1.0, "the clip must have had something to do"
    assert summary.values["optim/grad_norm"] == pytest.approx(norm, rel=1e-4)
