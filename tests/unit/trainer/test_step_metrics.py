"""A step in numbers, against plain sums."""

import dataclasses
import math

import pytest

from services.trainer.batch import ScoredRollout
from services.trainer.diagnostics import Mean
from services.trainer.loop import StepRecord
from services.trainer.objectives.config import ObjectiveConfig, SupportWeight
from services.trainer.step_metrics import StepMetrics
from services.trainer.step_rollouts import Counts
from tests.unit.trainer.test_batch import scored
from tests.unit.trainer.tiny_training import Setup, TinyPrompt, reverse_kl

NEEDED = {
    *("distill/overlap_ratio", "distill/overlap_advantage", "distill/overlap_advantage_sum"),
    *("distill/entropy_student", "distill/entropy_teacher", "distill/entropy_gap"),
    *("distill/overlap_mass_student", "distill/overlap_mass_teacher", "distill/mass99_overlap"),
    *("distill/extreme_prob_gap", "distill/empty_overlap_fraction"),
    *("loss/reverse_kl", "loss/objective", "optim/grad_norm", "optim/lr"),
    *("rollout/response_length", "rollout/truncated_fraction", "rollout/sampled_reverse_kl", "rollout/policy_lag"),
    *("queue/rollouts_sent", "queue/rollouts_scored", "queue/rollouts_lost"),
    *("timing/rollout", "timing/score_wait", "timing/forward_backward", "timing/optimizer", "timing/publish"),
    *("timing/step", "timing/tokens_per_second", "timing/metrics"),
    *("distill/extreme_prob_gap_abs", "distill/uniform_teacher_fraction", "rollout/teacher_reward"),
}


@pytest.fixture(scope="module")
def step() -> StepRecord:
    """With an objective whose own loss is not eq 5."""
    objective = ObjectiveConfig(score_top_k=6, kind="sampled_token")
    return Setup(num_steps=1, objective=objective).loop().run_step()


def test_every_metric_of_the_contract_is_there(step: StepRecord) -> None:
    summary = StepMetrics(weight=SupportWeight.STUDENT, decode=None).summarize(step)
    assert set(summary.values) >= NEEDED
    assert "outcome/accuracy" not in summary.values
    assert all(math.isfinite(value) for value in summary.values.values())
    assert summary.values["rollout/policy_lag"] == 0 and "rollout/policy_lags" not in summary.arrays
    assert sum(summary.arrays["distill/overlap_ratio/by_position/count"]) == num_positions(step.scored)


def num_positions(items: object) -> int:
    return sum(item.num_response_tokens for item in items)  # type: ignore[attr-defined]


def test_reverse_kl_is_eq_5_whatever_is_trained(step: StepRecord) -> None:
    values = StepMetrics(weight=SupportWeight.STUDENT, decode=None).summarize(step).values
    by_hand = [
        reverse_kl(student, teacher)
        for item in step.scored
        for student, teacher in zip(item.rollout.topk_logprobs, item.scores.candidate_logprobs, strict=True)
    ]
    assert values["loss/reverse_kl"] == pytest.approx(math.fsum(by_hand) / len(by_hand), rel=1e-6)
    gaps = [
        float(student) - float(teacher)
        for item in step.scored
        for student, teacher in zip(item.rollout.sampled_logprobs, item.scores.sampled_logprobs, strict=True)
    ]
    assert values["rollout/sampled_reverse_kl"] == pytest.approx(math.fsum(gaps) / len(gaps), rel=1e-6)


def record(
    items: list[ScoredRollout], prompts: list[TinyPrompt], fingerprints: dict[str, str] | None = None
) -> StepRecord:
    return StepRecord(
        step=1,
        prompts=prompts,
        scored=items,
        fingerprints=fingerprints or {"": "teacher-1"},
        counts=Counts(sent=4, scored=3, lost=1),
        losses={"loss/objective": Mean(total=6.0, count=4.0)},
        grad_norm=2.5,
        lr=0.125,
        timings_s={"rollout": 2.0, "step": 4.0},
    )


def test_counts_speed_and_optimizer_are_passed_on() -> None:
    items = [scored("a", [5], [8, 9, 1]), scored("b", [5], [8])]
    prompt = TinyPrompt(prompt_token_ids=items[0].rollout.prompt_token_ids, teacher_prompt_token_ids=None)
    values = StepMetrics(weight=SupportWeight.STUDENT, decode=None).summarize(record(items, [prompt])).values
    assert (values["queue/rollouts_sent"], values["queue/rollouts_scored"], values["queue/rollouts_lost"]) == (4, 3, 1)
    assert (values["optim/grad_norm"], values["optim/lr"], values["loss/objective"]) == (2.5, 0.125, 1.5)
    assert (values["timing/tokens_per_second"], values["timing/rollout_tokens_per_second"]) == (1.0, 2.0)


def test_the_age_of_the_weights_is_told_of_each_rollout() -> None:
    items = [scored(name, [5], [8, 9]) for name in "abc"]
    items = [
        dataclasses.replace(item, rollout=dataclasses.replace(item.rollout, policy_version=version))
        for item, version in zip(items, (6, 4, 5), strict=True)
    ]
    prompt = TinyPrompt(prompt_token_ids=items[0].rollout.prompt_token_ids, teacher_prompt_token_ids=None)
    late = dataclasses.replace(record(items, [prompt]), step=7)
    summary = StepMetrics(weight=SupportWeight.STUDENT, decode=None).summarize(late)
    assert summary.values["rollout/policy_lag"] == 1.0
    assert summary.arrays["rollout/policy_lags"] == [0.0, 1.0, 2.0]


def test_rollouts_are_graded_where_the_answer_is_known() -> None:
    texts = {8: "It is 42.\nAnswer: 42", 9: "Answer: 41", 7: "Answer: 42"}
    items = [scored(name, [5], [token]) for name, token in (("a", 8), ("b", 9), ("c", 7))]
    items = [
        dataclasses.replace(item, rollout=dataclasses.replace(item.rollout, group=group))
        for group, item in enumerate(items)
    ]
    ids = items[0].rollout.prompt_token_ids
    known = TinyPrompt(prompt_token_ids=ids, teacher_prompt_token_ids=ids, template="dapo", answer="42")
    unknown = dataclasses.replace(known, answer=None)
    metrics = StepMetrics(weight=SupportWeight.STUDENT, decode=lambda token_ids: texts[token_ids[0]])
    values = metrics.summarize(record(items, [known, known, unknown])).values
    assert values["outcome/accuracy"] == 0.5


def test_each_teacher_has_its_own_means_and_counts() -> None:
    items = [scored("a", [5], [8, 9, 1]), scored("b", [5], [8])]
    items[1] = dataclasses.replace(items[1], rollout=dataclasses.replace(items[1].rollout, group=1))
    ids = items[0].rollout.prompt_token_ids
    prompts = [
        TinyPrompt(prompt_token_ids=ids, teacher_prompt_token_ids=ids, teacher=name) for name in ("code", "math")
    ]
    metrics = StepMetrics(weight=SupportWeight.STUDENT, decode=None)
    values = metrics.summarize(record(items, prompts, {"code": "1", "math": "2", "law": "3"})).values
    alone = {
        name: metrics.summarize(record([item], prompts)).values
        for name, item in zip(("code", "math"), items, strict=True)
    }
    for key in ("loss/reverse_kl", "distill/overlap_ratio"):
        assert {name: values[f"{key}/teacher/{name}"] for name in alone} == {n: alone[n][key] for n in alone}
        assert values[key] == pytest.approx((3 * alone["code"][key] + alone["math"][key]) / 4)
    counts = [values[f"queue/rollouts_scored/teacher/{name}"] for name in ("code", "math", "law")]
    tokens = [values[f"rollout/response_tokens/teacher/{name}"] for name in ("code", "math", "law")]
    assert (counts, tokens) == ([1, 1, 0], [3, 1, 0])


def test_a_fraction_is_measured_in_full_the_same_again_and_another_at_each_step(step: StepRecord) -> None:
    def measured(fraction: float, number: int) -> dict[str, float]:
        metrics = StepMetrics(weight=SupportWeight.STUDENT, decode=None, fraction=fraction, seed=3)
        summary = metrics.summarize(dataclasses.replace(step, step=number))
        assert sum(summary.arrays["distill/entropy_gap/by_position/count"]) == num_positions(step.scored)
        return {name: value for name, value in summary.values.items() if name.startswith(("distill/", "loss/"))}

    everything, half = measured(1.0, 1), measured(0.5, 1)
    assert half == measured(0.5, 1) and half.keys() == everything.keys()
    assert half["distill/entropy_gap"] == everything["distill/entropy_gap"]
    ratios = {measured(0.5, number)["distill/overlap_ratio"] for number in range(1, 6)}
    assert len(ratios) > 1 and everything["distill/overlap_ratio"] not in ratios
    overlaps = [
        len(set(student) & set(teacher)) / 6
        for item in step.scored
        for student, teacher in zip(item.rollout.topk_token_ids, item.scores.topk_token_ids, strict=True)
    ]
    assert everything["distill/overlap_ratio"] == pytest.approx(math.fsum(overlaps) / len(overlaps), rel=1e-12)


def test_a_probe_adds_its_own_metrics_and_all_of_it_is_timed(step: StepRecord) -> None:
    metrics = StepMetrics(weight=SupportWeight.STUDENT, decode=None, probe=lambda record: {"a/step": record.step})
    values = metrics.summarize(step).values
    assert values["a/step"] == step.step and values["timing/metrics"] > 0
