"""What the student says of rollouts that nobody recorded, against plain float64 passes and a recording engine."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from opd.errors import InternalError, NonFiniteError
from opd.types import PAD_ID, Rollout
from services.trainer.batch import build_batch
from services.trainer.objectives.config import ObjectiveConfig, SupportWeight
from services.trainer.rollout.base import RolloutRequest, SamplingParams
from services.trainer.rollout.completed import CompletedRollouts
from services.trainer.rollout.transformers_engine import TransformersEngine
from services.trainer.step_metrics import StepMetrics
from services.trainer.student import Student
from services.trainer.support_pass import SupportPass, measured_places
from tests.unit.trainer.tiny_training import EOS, NUM_IDS, Setup, tiny_model

K = 5
EVERYTHING = [f"run.0.{index}" for index in range(8)]


def sampled(model: Any, *, score_top_k: int | None, sampling: SamplingParams | None = None) -> list[Rollout]:
    """Equal tokens however much is recorded."""
    engine = TransformersEngine(model, eos_token_ids=[EOS], num_defined_ids=NUM_IDS, score_top_k=score_top_k)
    requests = [
        RolloutRequest(
            rollout_id=name, group=index, prompt_token_ids=np.arange(2, 4 + index % 3, dtype=np.int32), seed=index
        )
        for index, name in enumerate(EVERYTHING)
    ]
    return engine.sample(requests, sampling or SamplingParams(max_response_tokens=12))


def passed(model: Any, **changes: Any) -> SupportPass:
    student = Student(model, num_defined_ids=NUM_IDS, row_chunk=7)
    return SupportPass(student=student, score_top_k=K, **({"max_tokens": 40} | changes))


def brute_force(model: Any, rollout: Rollout, temperature: float) -> torch.Tensor:
    """Log-probs of the response's rows [R, V], from one plain pass in float64."""
    wide = tiny_model(1)
    wide.load_state_dict(model.state_dict())
    ids = np.concatenate([rollout.prompt_token_ids, rollout.response_token_ids]).astype(np.int64)
    with torch.no_grad():
        logits_LV = wide.double()(input_ids=torch.from_numpy(ids)[None]).logits[0]
    return (logits_LV[rollout.prompt_token_ids.size - 1 : -1].double() / temperature).log_softmax(dim=-1)


def is_unknown(values: np.ndarray) -> bool:
    return bool(np.isnan(values).all())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_bare_tokens_get_what_a_plain_pass_says(temperature: float) -> None:
    model = tiny_model(1)
    sampling = SamplingParams(max_response_tokens=12, temperature=temperature)
    bare = sampled(model, score_top_k=None, sampling=sampling)
    assert all(is_unknown(rollout.entropy) and rollout.topk_token_ids.shape[1] == 0 for rollout in bare)
    complete = passed(model, temperature=temperature).complete(bare, EVERYTHING)
    assert [rollout.rollout_id for rollout in complete] == EVERYTHING
    for rollout in complete:
        logprobs_RV = brute_force(model, rollout, temperature)
        best_RK = logprobs_RV.topk(K, dim=-1)
        rows_R = torch.arange(len(logprobs_RV))
        expected_R = logprobs_RV[rows_R, torch.from_numpy(rollout.response_token_ids).long()]
        np.testing.assert_array_equal(rollout.topk_token_ids, best_RK.indices)
        np.testing.assert_allclose(rollout.topk_logprobs, best_RK.values, atol=2e-5)
        np.testing.assert_allclose(rollout.sampled_logprobs, expected_R, atol=2e-5)
        np.testing.assert_allclose(rollout.rollout_logprobs, expected_R, atol=2e-5)
        np.testing.assert_allclose(rollout.entropy, -(logprobs_RV.exp() * logprobs_RV).sum(-1), atol=2e-5)
        assert rollout.topk_token_ids.dtype == np.int32 and rollout.entropy.dtype == np.float32


def test_a_rollout_comes_out_as_the_recording_engine_gives_it() -> None:
    model = tiny_model(1)
    recorded = sampled(model, score_top_k=K)
    complete = passed(model).complete(sampled(model, score_top_k=None), EVERYTHING)
    for ours, theirs in zip(complete, recorded, strict=True):
        for field in dataclasses.fields(Rollout):
            found, expected = getattr(ours, field.name), getattr(theirs, field.name)
            if isinstance(expected, np.ndarray):
                assert found.dtype == expected.dtype and found.flags["C_CONTIGUOUS"], field.name
                np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=field.name)
            else:
                assert found == expected


def test_what_is_not_measured_gets_ids_alone() -> None:
    model = tiny_model(1)
    recorded = sampled(model, score_top_k=K)
    bare = sampled(model, score_top_k=None)
    complete = passed(model).complete(bare, {"run.0.2", "run.0.5"})
    for index, (ours, theirs) in enumerate(zip(complete, recorded, strict=True)):
        np.testing.assert_array_equal(ours.topk_token_ids, theirs.topk_token_ids)
        for name in ("topk_logprobs", "sampled_logprobs", "rollout_logprobs", "entropy"):
            assert is_unknown(getattr(ours, name)) is (index not in (2, 5)), name


def test_without_a_need_for_ids_only_what_is_measured_is_passed_over() -> None:
    model = tiny_model(1)
    bare = sampled(model, score_top_k=None)
    complete = passed(model, needs_support=False).complete(bare, {"run.0.2"})
    assert [ours is theirs for ours, theirs in zip(complete, bare, strict=True)] == [True] * 2 + [False] + [True] * 5
    assert complete[2].topk_token_ids.shape[1] == K


def test_what_the_engine_said_is_kept() -> None:
    """An engine that gives ids and log-probs with the tokens, and no entropy."""
    model = tiny_model(1)
    marked = [
        dataclasses.replace(rollout, entropy=np.full_like(rollout.entropy, np.nan), sampled_logprobs=rollout.entropy)
        for rollout in sampled(model, score_top_k=K)
    ]
    complete = passed(model).complete(marked, {"run.0.1"})
    assert [ours is theirs for ours, theirs in zip(complete, marked, strict=True)].count(False) == 1
    np.testing.assert_allclose(complete[1].entropy, marked[1].sampled_logprobs, atol=2e-5)
    for name in ("topk_token_ids", "topk_logprobs", "sampled_logprobs", "rollout_logprobs"):
        assert getattr(complete[1], name) is getattr(marked[1], name)
    whole = sampled(model, score_top_k=K)
    assert all(ours is theirs for ours, theirs in zip(passed(model).complete(whole, EVERYTHING), whole, strict=True))


def test_a_sampler_that_cuts_off_tokens_keeps_its_log_probs_to_itself() -> None:
    model = tiny_model(1)
    bare = sampled(model, score_top_k=None, sampling=SamplingParams(max_response_tokens=12, top_p=0.5))
    complete = passed(model, keeps_every_token=False).complete(bare, EVERYTHING)
    assert all(is_unknown(rollout.rollout_logprobs) for rollout in complete)
    assert not any(np.isnan(rollout.sampled_logprobs).any() for rollout in complete)


@pytest.mark.parametrize("measured", [EVERYTHING, []])
def test_logits_that_are_no_numbers_are_named(measured: Sequence[str]) -> None:
    model = tiny_model(1)
    bare = sampled(model, score_top_k=None)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"^rollout run\.0\.\d: the student's logits at response position 0 are"):
        passed(model).complete(bare, measured)


def test_passing_leaves_no_gradient_and_trains_on_as_before() -> None:
    model = tiny_model(1)
    bare = sampled(model, score_top_k=None)
    passed(model).complete(bare, EVERYTHING[:2])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.01])
def test_what_is_measured_depends_on_seed_and_step_alone(fraction: float) -> None:
    def drawn(step: int) -> list[int]:
        places = measured_places(40, fraction=fraction, seed=3, step=step)
        return [index for index in range(40) if index in places]

    assert len(drawn(1)) == max(1, round(40 * fraction)) and drawn(1) == drawn(1)
    assert fraction in (1.0, 0.01) or drawn(1) != drawn(2)


def bare_setup(setup: Setup, *, fraction: float, needs_support: bool) -> Setup:
    engine = TransformersEngine(setup.student_model, eos_token_ids=[EOS], num_defined_ids=NUM_IDS, score_top_k=None)
    completing = SupportPass(student=setup.student, score_top_k=6, needs_support=needs_support)
    setup.engine = CompletedRollouts(engine, completing, fraction=fraction, seed=5)
    return setup


def metrics_of(record: Any) -> dict[str, float]:
    return StepMetrics(weight=SupportWeight.STUDENT, decode=None, fraction=0.25, seed=5).summarize(record).values


@pytest.mark.parametrize("support", ["student", "teacher", "union"])
def test_a_run_on_bare_tokens_trains_as_one_on_recorded_ones(support: str) -> None:
    """Two whole steps, the teacher asked at the ids that were found; of each step two of the rollouts are measured."""
    objective = ObjectiveConfig(score_top_k=6, support=support)
    recorded = Setup(objective=objective, num_steps=2)
    bare = bare_setup(Setup(objective=objective, num_steps=2), fraction=0.25, needs_support=support != "teacher")
    records: dict[str, list[Any]] = {"recorded": [], "bare": []}
    recorded.loop().run(records["recorded"].append)
    bare.loop().run(records["bare"].append)
    torch.testing.assert_close(bare.parameters(), recorded.parameters(), rtol=0, atol=2e-6)
    for ours, theirs in zip(records["bare"], records["recorded"], strict=True):
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        assert [is_unknown(item.rollout.entropy) for item in ours.scored].count(False) == 2
        widths = {item.rollout.topk_token_ids.shape[1] for item in ours.scored}
        assert widths == ({0, 6} if support == "teacher" else {6})
        # What compares the ids is measured on just the rollouts that have everything.
        found, expected = metrics_of(ours), metrics_of(theirs)
        for name in ("distill/overlap_ratio", "distill/overlap_mass_student", "loss/reverse_kl"):
            assert found[name] == pytest.approx(expected[name], abs=1e-5), name


def test_a_support_without_ids_is_no_empty_support() -> None:
    """Forgetting that every rollout needs ids ends in an error, not in a loss of 0."""
    setup = bare_setup(Setup(num_steps=1), fraction=0.01, needs_support=False)
    with pytest.raises(InternalError, match=r"a support column needs the teacher's log-probs, which were not given"):
        setup.loop().run_step()


def test_unused_columns_stand_where_nobody_looked_for_ids() -> None:
    setup = Setup(objective=ObjectiveConfig(score_top_k=6, support="teacher"))
    record = bare_setup(setup, fraction=0.25, needs_support=False).loop().run_step()
    batch = build_batch(list(record.scored))
    places = measured_places(len(record.scored), fraction=0.25, seed=5, step=1)
    is_measured_T = torch.tensor([index in places for index in batch.rollout_index_T.tolist()])
    assert 0 < is_measured_T.sum() < len(is_measured_T)
    assert (batch.support_ids_TK[is_measured_T] >= 0).all()
    assert (batch.support_ids_TK[~is_measured_T] == PAD_ID).all()
    assert batch.student_support_logprobs_TK[~is_measured_T].isnan().all()
    assert batch.teacher_support_logprobs_TK is None


def test_the_engine_in_front_is_one_like_any_other() -> None:
    """The temperature and the cuts are those of the call; the version goes through; without listeners it works too."""
    model = tiny_model(1)
    inner = TransformersEngine(model, eos_token_ids=[EOS], num_defined_ids=NUM_IDS, score_top_k=None)
    engine = CompletedRollouts(inner, passed(model, temperature=9.0, keeps_every_token=True))
    engine.policy_version = 4
    assert (inner.policy_version, engine.max_context, engine.samples_elsewhere) == (4, inner.max_context, False)
    request = RolloutRequest(rollout_id="a", group=0, prompt_token_ids=np.array([3], np.int32), seed=0)
    recording = TransformersEngine(model, eos_token_ids=[EOS], num_defined_ids=NUM_IDS, score_top_k=K)
    for settings in ({}, {"temperature": 0.6}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 2}):
        sampling = SamplingParams(max_response_tokens=8, **settings)
        (ours,), (theirs,) = engine.sample([request], sampling), recording.sample([request], sampling)
        assert ours.policy_version == 4
        np.testing.assert_allclose(ours.topk_logprobs, theirs.topk_logprobs, atol=2e-5)
        assert is_unknown(ours.rollout_logprobs) is (settings.keys() <= {"top_p", "top_k"} and bool(settings))
