"""Steps that learn from rewards: no teacher where none is needed, whole groups, and what the horizon leaves out."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from opd.errors import DeadLetterError
from opd.types import Rollout, ScoreReply, ScoreRequest
from services.trainer.batch import ScoredRollout
from services.trainer.config import OptimSettings
from services.trainer.diagnostics import Mean
from services.trainer.horizon import Horizon
from services.trainer.loop import StepRecord
from services.trainer.objectives.config import HorizonConfig, ObjectiveConfig, SupportWeight
from services.trainer.objectives.outcome import group_advantages
from services.trainer.step_metrics import StepMetrics
from services.trainer.step_rollouts import StepPrompt
from tests.unit.trainer.tiny_training import EOS, Setup, tiny_model

GRPO = ObjectiveConfig(kind="grpo", score_top_k=6)


def run(setup: Setup) -> list[StepRecord]:
    records: list[StepRecord] = []
    setup.loop().run(records.append)
    return records


def likes_short(rollout: Rollout, prompt: StepPrompt) -> float:
    del prompt
    return float(rollout.response_token_ids[-1] == EOS)


def test_rewards_alone_teach_and_no_teacher_is_asked() -> None:
    setup = Setup(
        objective=GRPO, reward=likes_short, num_steps=6, prompts_per_step=8, rollouts_per_prompt=6, max_slots=48,
        max_micro_batch_tokens=2000, optim=OptimSettings(lr=1e-2),
    )  # fmt: skip
    records = run(setup)
    rewards = [record.losses["outcome/reward"].value for record in records]
    assert rewards[0] < 0.8 and np.mean(rewards[-3:]) > 0.95
    assert setup.client.requests == [] and records[0].fingerprints == {}


def gradient_by_hand(model: Any, scored: list[ScoredRollout], advantages: dict[str, float]) -> torch.Tensor:
    """-A log p(y), the mean over all tokens of the step, from whole float64 logits."""
    total = torch.zeros((), dtype=torch.float64)
    for item in scored:
        ids = np.concatenate([item.rollout.prompt_token_ids, item.rollout.response_token_ids]).astype(np.int64)
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, item.rollout.prompt_token_ids.size - 1 : -1]
        sampled = torch.from_numpy(item.rollout.response_token_ids.astype(np.int64))[:, None]
        total = total - advantages[item.rollout.rollout_id] * logits.log_softmax(-1).gather(1, sampled).sum()
    (total / sum(item.num_response_tokens for item in scored)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def graded_step(**changes: Any) -> tuple[Setup, StepRecord, Any]:
    """One step with rewards by rollout, and the student as it was before."""
    setup = Setup(num_steps=1, rollouts_per_prompt=4, reward=likes_short, **changes)
    before = copy.deepcopy(setup.student_model).double()
    return setup, setup.loop().run_step(), before


def test_the_gradient_is_that_of_the_advantages_over_all_tokens() -> None:
    setup, record, before = graded_step(objective=GRPO)
    scored = list(record.scored)
    rewards = [likes_short(item.rollout, None) for item in scored]  # type: ignore[arg-type]
    advantages = group_advantages(rewards, [item.rollout.group for item in scored])
    assert [item.advantage for item in scored] == pytest.approx(advantages) and any(advantages)
    by_id = {item.rollout.rollout_id: value for item, value in zip(scored, advantages, strict=True)}
    setup.student_model.load_state_dict({name: value.float() for name, value in before.state_dict().items()})
    found = setup.accumulate(scored)
    expected = gradient_by_hand(before, scored, by_id)
    assert (found.double() - expected).norm() <= 1e-4 * expected.norm()


def test_a_group_is_judged_by_all_its_rewards_also_where_one_was_not_scored() -> None:
    def refuse_one(request: ScoreRequest, reply: ScoreReply) -> ScoreReply:
        if request.rollout_id.endswith(".2"):
            raise DeadLetterError("no")
        return reply

    objective = ObjectiveConfig(score_top_k=6, outcome={"weight": 0.5})
    whole = graded_step(objective=objective)[1]
    setup = Setup(num_steps=1, rollouts_per_prompt=4, reward=likes_short, objective=objective, drops_unscored=True)
    setup.client.alter = refuse_one
    partial = setup.loop().run_step()
    kept = {item.rollout.rollout_id: item.advantage for item in partial.scored}
    assert len(kept) == len(whole.scored) - 1
    assert kept == {item.rollout.rollout_id: item.advantage for item in whole.scored if item.rollout.rollout_id in kept}
    assert partial.losses["outcome/reward"] == whole.losses["outcome/reward"]


def test_groups_without_a_difference_are_counted() -> None:
    def only_odd_groups(rollout: Rollout, prompt: StepPrompt) -> float:
        return rollout.group % 2 * likes_short(rollout, prompt)

    setup = Setup(objective=GRPO, reward=only_odd_groups, num_steps=1, rollouts_per_prompt=8)
    record = setup.loop().run_step()
    found: dict[int, list[float | None]] = {}
    for item in record.scored:
        found.setdefault(item.rollout.group, []).append(item.advantage)
    equal = sum(not any(values) for values in found.values())
    assert equal >= 2
    assert record.losses["outcome/zero_variance_fraction"] == Mean(total=equal, count=4)


def test_metrics_of_a_run_without_a_teacher_name_no_teacher() -> None:
    _, record, _ = graded_step(objective=GRPO)
    values = StepMetrics(weight=SupportWeight.STUDENT, decode=None).summarize(record).values
    assert {"outcome/reward", "loss/objective", "distill/entropy_student", "timing/grade"} <= values.keys()
    assert not {"distill/overlap_ratio", "loss/reverse_kl", "distill/entropy_teacher", "rollout/teacher_reward"} & set(
        values
    )


def test_the_mean_is_over_what_the_horizon_leaves_and_the_horizon_is_reported() -> None:
    horizon = Horizon(HorizonConfig(start=4, growth=2.0, min_positions=1), longest=12)
    setup = Setup(objective=ObjectiveConfig(score_top_k=6), num_steps=1, horizon=horizon)
    record = setup.loop().run_step()
    trained = sum(min(4, item.num_response_tokens) for item in record.scored)
    assert record.losses["loss/objective"].count == trained < sum(item.num_response_tokens for item in record.scored)
    assert record.losses["horizon/length"].value == 4
    resumed = Horizon(
        HorizonConfig(start=4, growth=2.0, min_positions=1),
        longest=12,
        records=[{name: mean.value for name, mean in record.losses.items()}],
    )
    assert resumed.length == horizon.length


def test_beyond_the_horizon_the_outcome_trains_and_the_teacher_does_not() -> None:
    """With an outcome worth nothing beyond the horizon, only the front moves the weights."""
    objective = ObjectiveConfig(
        score_top_k=6, horizon={"start": 3}, outcome={"weight": 1.0, "region": "beyond_horizon"}
    )
    horizon = Horizon(HorizonConfig(start=3), longest=12)
    setup, record, before = graded_step(objective=objective, horizon=horizon)
    assert record.losses["loss/objective"].count == sum(item.num_response_tokens for item in record.scored)
    assert record.losses["loss/signal"].count == sum(min(3, item.num_response_tokens) for item in record.scored)
    silent = [dataclasses.replace(item, advantage=0.0) for item in record.scored]
    gradients = []
    for items in (list(record.scored), silent):
        setup.student_model.load_state_dict({name: value.float() for name, value in before.state_dict().items()})
        gradients.append(setup.accumulate(items).clone())
    assert (gradients[0] - gradients[1]).norm() > 1e-3 and gradients[1].norm() > 1e-3


def test_an_entropy_bonus_trains_beyond_the_horizon_too() -> None:
    """A teacher that is the student itself pulls nowhere, so that the gradient is that of the entropy alone."""
    objective = ObjectiveConfig(score_top_k=6, horizon={"start": 3}, entropy_bonus=0.5)
    setup = Setup(
        objective=objective,
        horizon=Horizon(HorizonConfig(start=3), longest=12),
        num_steps=1,
        teacher_model=tiny_model(1),
    )
    before = copy.deepcopy(setup.student_model).double()
    record = setup.loop().run_step()
    assert record.losses["loss/signal"].count == sum(min(3, item.num_response_tokens) for item in record.scored)
    num_positions = sum(item.num_response_tokens for item in record.scored)
    assert record.losses["loss/objective"].count == record.losses["loss/entropy_bonus"].count == num_positions
    total = torch.zeros((), dtype=torch.float64)
    for item in record.scored:
        ids = np.concatenate([item.rollout.prompt_token_ids, item.rollout.response_token_ids]).astype(np.int64)
        logits = before(input_ids=torch.from_numpy(ids)[None]).logits[0, item.rollout.prompt_token_ids.size - 1 : -1]
        total = total + (logits.softmax(-1) * logits.log_softmax(-1)).sum()
    (0.5 * total / num_positions).backward()
    expected = torch.stack([parameter.grad.norm() for parameter in before.parameters()]).norm()
    assert record.grad_norm == pytest.approx(float(expected), rel=1e-3)
