"""Steps whose scores come late, in any order, or for weights that have moved on."""

import dataclasses
import random
import threading
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from opd.errors import DeadLetterError, InternalError, RolloutEngineError
from opd.types import Rollout, ScoreReply, ScoreRequest
from services.trainer.config import OptimSettings
from services.trainer.loop import StepRecord, TrainingLoop
from services.trainer.objectives.config import ObjectiveConfig
from services.trainer.pipeline import PipelineMode
from services.trainer.step_clock import StepClock
from services.trainer.step_rollouts import StepPrompt
from tests.unit.trainer.tiny_training import EOS, TEACHER_INFO, ExactClient, Setup, in_dtype, tiny_model

OBJECTIVE = ObjectiveConfig(score_top_k=6)
LAGGED = ObjectiveConfig(score_top_k=6, staleness_cap=2.0)


class LateClient(ExactClient):
    """Answers from threads, each reply after a delay of its own that `seed` decides."""

    def __init__(self, model: Any, *, seed: int, longest_s: float = 0.05) -> None:
        super().__init__(model=model)
        self._random = random.Random(seed)
        self._longest_s = longest_s

    def submit(self, request: ScoreRequest) -> Future[ScoreReply]:
        reply = super().submit(request)
        late: Future[ScoreReply] = Future()

        def pass_on() -> None:
            if late.set_running_or_notify_cancel():
                error = reply.exception()
                late.set_exception(error) if error else late.set_result(reply.result())

        threading.Timer(self._random.random() * self._longest_s, pass_on).start()
        return late


def late(seed: int, **changes: Any) -> Setup:
    model = tiny_model(2)
    return Setup(teacher_model=model, client=LateClient(model, seed=seed), **({"num_steps": 1} | changes))


def run(setup: Setup) -> list[StepRecord]:
    records: list[StepRecord] = []
    setup.loop().run(records.append)
    return records


def unclipped(setup: Setup) -> list[torch.Tensor]:
    """The gradients of the run's steps, each as it was before clipping."""
    found: list[torch.Tensor] = []
    clip = setup.optimizer.clip

    def noted() -> float:
        found.append(torch.cat([parameter.grad.flatten() for parameter in setup.student_model.parameters()]).clone())
        return clip()

    setup.optimizer.clip = noted  # type: ignore[method-assign]
    run(setup)
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    "objective",
    [OBJECTIVE, ObjectiveConfig(score_top_k=6, aggregation="sequence_mean", support="union")],
    ids=["token-mean", "sequence-mean"],
)
def test_the_gradient_is_that_of_a_step_that_waits_for_everything(
    dtype: torch.dtype, tolerance: float, objective: ObjectiveConfig
) -> None:
    def gradient(seed: int, **changes: Any) -> torch.Tensor:
        model = in_dtype(tiny_model(1), dtype)
        return unclipped(late(seed, student_model=model, objective=objective, **changes))[0]

    whole = gradient(0, mode=PipelineMode.SEQUENTIAL, max_micro_batch_tokens=10_000)
    for seed in (1, 2, 3):
        streamed = gradient(seed, max_micro_batch_tokens=40)
        assert (streamed - whole).norm() <= tolerance * whole.norm()
    assert whole.norm() > 1e-3


def test_parts_are_trained_while_others_are_still_being_scored() -> None:
    setup = late(0, prompts_per_step=6, max_micro_batch_tokens=40)
    setup.client._longest_s = 0.4
    waiting: list[int] = []
    loss = setup.loss
    unanswered: set[str] = set()
    submit = setup.client.submit

    def noted_submit(request: ScoreRequest) -> Future[ScoreReply]:
        reply: Future[ScoreReply] = submit(request)
        unanswered.add(request.rollout_id)
        reply.add_done_callback(lambda _: unanswered.discard(request.rollout_id))
        return reply

    def noted_loss(batch: Any) -> Any:
        waiting.append(len(unanswered))
        return loss(batch)

    setup.client.submit = noted_submit
    setup.loss = noted_loss  # type: ignore[assignment]
    run(setup)
    assert waiting[0] > 0 and waiting[-1] == 0


def test_metrics_are_the_same_to_the_bit_where_a_step_waits_for_all_scores() -> None:
    """As a deterministic run does: the cut depends on lengths and ids, not on when scores come."""

    def losses(seed: int) -> list[dict[str, float]]:
        records = run(late(seed, num_steps=3, mode=PipelineMode.SEQUENTIAL, max_micro_batch_tokens=40))
        return [{name: mean.value for name, mean in record.losses.items()} for record in records]

    assert losses(1) == losses(2) == losses(3)


class Elsewhere:
    """The same engine, said to decode in a process of its own."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.samples_elsewhere = True
        self.ended: list[str] = []

    policy_version = property(
        lambda self: self._engine.policy_version, lambda self, value: setattr(self._engine, "policy_version", value)
    )

    def sample(self, requests: Any, sampling: Any, *, on_finish: Any) -> list[Rollout]:
        rollouts: list[Rollout] = self._engine.sample(requests, sampling)
        for rollout in rollouts:
            self.ended.append(rollout.rollout_id)
            on_finish(rollout)
        return rollouts


def test_an_engine_elsewhere_is_trained_beside() -> None:
    setup = Setup(num_steps=1, max_micro_batch_tokens=40)
    setup.engine = Elsewhere(setup.engine)
    ended_when: list[int] = []
    loss = setup.loss

    def noted_loss(batch: Any) -> Any:
        ended_when.append(len(setup.engine.ended))
        return loss(batch)

    setup.loss = noted_loss  # type: ignore[assignment]
    record = run(setup)[0]
    assert ended_when[0] < 8 and len(record.scored) == 8


def test_with_rewards_nothing_trains_before_its_group_is_whole() -> None:
    ends: list[tuple[str, int]] = []

    def likes_short(rollout: Rollout, prompt: StepPrompt) -> float:
        del prompt
        return float(rollout.response_token_ids[-1] == EOS)

    objective = ObjectiveConfig(score_top_k=6, outcome={"weight": 0.5})
    setup = Setup(
        num_steps=1, rollouts_per_prompt=4, max_micro_batch_tokens=20, objective=objective, reward=likes_short
    )
    setup.engine = Elsewhere(setup.engine)
    loss = setup.loss

    def noted_loss(batch: Any) -> Any:
        ends.extend((name, len(setup.engine.ended)) for name in batch.rollout_ids)
        return loss(batch)

    setup.loss = noted_loss  # type: ignore[assignment]
    record = run(setup)[0]
    for name, num_ended in ends:
        group = int(name.rpartition(".")[2]) // 4
        assert num_ended >= 4 * (group + 1)
    assert ends[0][1] < 16 and len(ends) == 16
    assert all(item.advantage is not None for item in record.scored)


def test_an_error_ends_the_step_while_others_are_still_awaited() -> None:
    setup = late(0)
    setup.client._longest_s = 30.0
    answers = setup.client

    def refuse(request: ScoreRequest) -> Future[ScoreReply]:
        if request.rollout_id == "run.0.3":
            failed: Future[ScoreReply] = Future()
            failed.set_exception(DeadLetterError("took its replica down 3 times"))
            return failed
        pending.append(Future())
        return pending[-1]

    pending: list[Future[ScoreReply]] = []
    answers.submit = refuse
    before = setup.parameters()
    with pytest.raises(DeadLetterError, match=r"^step 1: rollout run\.0\.3 was not scored: took its replica"):
        run(setup)
    assert torch.equal(setup.parameters(), before)
    assert len(pending) == 7 and all(reply.cancelled() for reply in pending)


@pytest.mark.parametrize("lag", [1, 2])
def test_a_lag_is_bounded_and_told_by_every_rollout(lag: int) -> None:
    setup = late(0, num_steps=5, max_policy_lag=lag, objective=LAGGED)
    loop = setup.loop()
    records: list[StepRecord] = []
    loop.run(records.append)
    ages = [{record.step - 1 - item.rollout.policy_version for item in record.scored} for record in records]
    assert ages == [{min(step, lag)} for step in range(5)]
    asked = [request.rollout_id for request in setup.client.requests]
    assert len(set(asked)) == len(asked) == 5 * 8
    # The id names the weights that sampled, which is what logs on both sides read in it.
    named = {item.rollout.rollout_id.split(".")[1] for record in records for item in record.scored}
    assert named == {str(version) for version in range(5 - lag)}
    assert (loop.counts.sent, loop.counts.scored, loop.counts.lost) == (40, 40, 0)
    assert [record.counts.sent for record in records] == [8] * 5


def test_with_a_lag_the_weight_is_the_ratio_to_the_sampler() -> None:
    """By hand from whole float64 logits: min(p_learner / p_rollout, cap) times eq 5 at each position."""
    setup = late(0, num_steps=2, max_policy_lag=1, objective=LAGGED, optim=OptimSettings(lr=3e-2))
    loop = setup.loop()
    loop.run_step()
    learner = {name: value.clone() for name, value in setup.student_model.state_dict().items()}
    record = loop.run_step()
    model = tiny_model(1).double()
    model.load_state_dict(learner)
    total, weights = 0.0, []
    for item in record.scored:
        ids = np.concatenate([item.rollout.prompt_token_ids, item.rollout.response_token_ids]).astype(np.int64)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, item.rollout.prompt_token_ids.size - 1 : -1]
        logprobs = logits.log_softmax(-1)
        sampled = logprobs.gather(1, torch.from_numpy(item.rollout.response_token_ids.astype(np.int64))[:, None])[:, 0]
        weight = (sampled - torch.from_numpy(item.rollout.rollout_logprobs).double()).exp().clamp(max=2.0)
        student = logprobs.gather(1, torch.from_numpy(item.rollout.topk_token_ids.astype(np.int64))).log_softmax(-1)
        teacher = torch.from_numpy(item.scores.candidate_logprobs).double().log_softmax(-1)
        total += float((weight * (student.exp() * (student - teacher)).sum(-1)).sum())
        weights += weight.tolist()
    assert max(abs(weight - 1) for weight in weights) > 1e-2
    assert record.losses["loss/objective"].value == pytest.approx(total / len(weights), rel=1e-5)
    assert record.losses["loss/staleness_weight"].value == pytest.approx(np.mean(weights), rel=1e-5)


def test_a_teacher_that_changes_meanwhile_has_said_what_it_said() -> None:
    """Rollouts sent to the old teacher keep its scores; those of the next step come from the new one."""
    setup = late(0, num_steps=4, max_policy_lag=1, objective=LAGGED)
    upgraded = dataclasses.replace(TEACHER_INFO, fingerprint="teacher-2")

    def upgrade(request: ScoreRequest) -> None:
        if len(setup.client.requests) == 16:
            setup.client.current_info = upgraded

    setup.client.on_submit = upgrade
    assert [record.fingerprints[""] for record in run(setup)] == ["teacher-1", "teacher-1", "teacher-2", "teacher-2"]


def test_a_reply_of_another_teacher_is_refused_with_a_lag_too() -> None:
    setup = Setup(num_steps=3, max_policy_lag=1, objective=LAGGED)
    setup.client.alter = lambda request, reply: dataclasses.replace(reply, teacher_fingerprint="teacher-9")
    with pytest.raises(InternalError, match=r"scored by teacher teacher-9 and not by the pinned teacher-1"):
        run(setup)


@pytest.mark.parametrize("mode", PipelineMode)
def test_every_second_of_a_step_has_a_name(mode: PipelineMode) -> None:
    setup = late(0, mode=mode)
    setup.client._longest_s = 0.3
    timings = run(setup)[0].timings_s
    named = sum(seconds for name, seconds in timings.items() if name != "step")
    assert timings["score_wait"] > 0 and 0.9 * timings["step"] <= named <= timings["step"]


def test_what_an_inner_part_takes_is_not_the_outer_ones() -> None:
    clock = StepClock()
    with clock.part("rollout"):
        with clock.part("grade"):
            threading.Event().wait(0.05)
        with clock.part("grade"):
            threading.Event().wait(0.05)
    timings = clock.timings_s()
    assert timings["grade"] >= 0.1 and timings["rollout"] < timings["grade"]


def test_a_loop_that_is_asked_for_its_counts_in_mid_step_knows_what_it_has_sent() -> None:
    setup = Setup(num_steps=1)
    loop: TrainingLoop = setup.loop()
    seen: list[int] = []
    setup.client.on_submit = lambda request: seen.append(loop.counts.sent)
    loop.run_step()
    assert seen == list(range(8)) and loop.counts.scored == 8


def test_a_step_whose_weights_do_not_reach_the_sampler_is_on_record_all_the_same() -> None:
    setup = Setup(num_steps=3)
    loop = setup.loop()
    publish = loop._weights.publish

    def refuses_two(version: int) -> None:
        if version == 2:
            raise RolloutEngineError("the engine is gone")
        publish(version)

    loop._weights.publish = refuses_two  # type: ignore[method-assign]
    records: list[StepRecord] = []
    with pytest.raises(RolloutEngineError, match=r"^step 2: the engine is gone$"):
        loop.run(records.append)
    assert [record.step for record in records] == [1, 2] and loop.step == 2 and not loop.is_updating
