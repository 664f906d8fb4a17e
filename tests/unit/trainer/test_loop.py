"""The step as an algorithm: what it computes, in which order, and what it refuses."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from opd.errors import ConfigError, DeadLetterError, InternalError, NonFiniteError, QueueUnavailableError
from opd.types import ScoreReply, ScoreRequest
from services.trainer.batch import ScoredRollout, build_batch
from services.trainer.config import OptimSettings
from services.trainer.loop import StepRecord
from services.trainer.objectives.config import ObjectiveConfig
from tests.unit.trainer.tiny_training import ExactClient, Setup, in_dtype, reverse_kl, tiny_model


def run(setup: Setup) -> list[StepRecord]:
    records: list[StepRecord] = []
    setup.loop().run(records.append)
    return records


def step_kl(record: StepRecord) -> float:
    """The token mean of eq 5 over a step, from what sampler and teacher recorded."""
    values = [
        reverse_kl(student, teacher)
        for item in record.scored
        for student, teacher in zip(item.rollout.topk_logprobs, item.scores.candidate_logprobs, strict=True)
    ]
    return math.fsum(values) / len(values)


def test_the_divergence_falls() -> None:
    records = run(Setup(num_steps=15, prompts_per_step=8, max_slots=16, optim=OptimSettings(lr=1e-2)))
    kls = [step_kl(record) for record in records]
    assert np.mean(kls[-3:]) < 0.5 * np.mean(kls[:3])
    assert [record.step for record in records] == list(range(1, 16))


def test_the_loss_is_the_token_mean_of_eq_5() -> None:
    record = run(Setup(num_steps=1))[0]
    assert record.losses["loss/objective"].value == pytest.approx(step_kl(record), rel=1e-4)


class Journal:
    """Writes down the order in which the parts of a step are used."""

    def __init__(self, setup: Setup) -> None:
        self.lines: list[str] = []
        setup.client.on_submit = lambda request: self.lines.append("send")
        self._wrap(setup.engine, "_batch", "sample", setup)
        self._wrap(setup.optimizer, "step", "optimizer", setup)
        self._wrap(setup.optimizer, "zero_grad", "zero_grad", setup)
        loss = setup.loss

        def noted_loss(batch: Any) -> Any:
            self.lines.append("loss")
            return loss(batch)

        setup.loss = noted_loss  # type: ignore[assignment]
        sample = setup.engine.sample

        def noted_sample(*args: Any, **named: Any) -> Any:
            found = sample(*args, **named)
            self.lines.append("sampled")
            return found

        setup.engine.sample = noted_sample

    def _wrap(self, owner: Any, name: str, line: str, setup: Setup) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **named: Any) -> Any:
            self.lines.append(line)
            return original(*args, **named)

        setattr(owner, name, noted)


def test_scores_are_asked_for_while_others_decode_and_the_optimizer_comes_last() -> None:
    setup = Setup(num_steps=1, max_slots=2)
    journal = Journal(setup)
    record = run(setup)[0]
    lines = journal.lines
    # Every request leaves before the engine returns: scoring overlaps decoding.
    assert lines[:2] == ["zero_grad", "sample"]
    assert lines[2:10] == ["send"] * 8
    assert lines[10] == "sampled"
    assert set(lines[11:-1]) == {"loss"} and len(lines[11:-1]) > 1
    assert lines[-1] == "optimizer"
    assert record.counts == dataclasses.replace(record.counts, sent=8, scored=8, lost=0)


def test_requests_leave_before_the_last_rollout_has_ended() -> None:
    setup = Setup(num_steps=1, max_slots=2)
    ended: list[int] = []
    sent_when: list[int] = []
    original = setup.engine._batch

    def counting_batch(*args: Any) -> Any:
        batch = original(*args)
        rollout = batch._rollout

        def counted(*inner: Any) -> Any:
            ended.append(1)
            return rollout(*inner)

        batch._rollout = counted
        return batch

    setup.engine._batch = counting_batch
    setup.client.on_submit = lambda request: sent_when.append(len(ended))
    run(setup)
    assert sent_when == list(range(1, 9))


def test_rollouts_are_sampled_from_the_weights_the_step_changes() -> None:
    records = run(Setup(num_steps=3))
    for record in records:
        assert {item.rollout.policy_version for item in record.scored} == {record.step - 1}


def test_a_rollout_of_another_version_is_refused() -> None:
    setup = Setup()
    loop = setup.loop()
    setup.engine.policy_version = 7
    with pytest.raises(InternalError, match=r"^step 1: rollout run\.0\.0 is of policy version 7, not 0$"):
        loop.run_step()


def gradient_of(
    model: Any, scored: list[ScoredRollout], max_tokens: int, objective: ObjectiveConfig, *, streams: bool = False
) -> torch.Tensor:
    setup = Setup(student_model=model, max_micro_batch_tokens=max_tokens, objective=objective)
    return setup.accumulate(scored, streams=streams)


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(score_top_k=6),
        ObjectiveConfig(score_top_k=6, gradient="policy", support="union"),
        ObjectiveConfig(score_top_k=6, kind="sampled_token"),
        ObjectiveConfig(score_top_k=6, support="teacher", aggregation="sequence_mean"),
        ObjectiveConfig(score_top_k=6, divergence="jsd", support="union", tail="bucket", position_discount=0.95),
        ObjectiveConfig(score_top_k=6, divergence="forward_kl", credit="to_go", entropy_bonus=0.01),
    ],
    ids=["exact", "policy-union", "sampled-token", "sequence-mean", "jsd-bucket", "forward-to-go-entropy"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_gradient_does_not_depend_on_micro_batches(
    objective: ObjectiveConfig, dtype: torch.dtype, tolerance: float
) -> None:
    scored = list(run(Setup(num_steps=1))[0].scored)
    model = in_dtype(tiny_model(1), dtype)
    whole = gradient_of(model, scored, 10_000, objective)
    for max_tokens, order in ((1, 1), (40, -1), (64, 1)):
        for streams in (False, True):
            split = gradient_of(model, scored[::order], max_tokens, objective, streams=streams)
            assert (split - whole).norm() <= tolerance * whole.norm()
    assert whole.norm() > 1e-3


def test_the_gradient_is_that_of_the_mean_over_all_positions() -> None:
    """Against plain autograd over full float64 logits, one rollout after the other."""
    scored = list(run(Setup(num_steps=1))[0].scored)
    model = tiny_model(1).double()
    total = torch.zeros((), dtype=torch.float64)
    for item in scored:
        ids = np.concatenate([item.rollout.prompt_token_ids, item.rollout.response_token_ids]).astype(np.int64)
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, item.rollout.prompt_token_ids.size - 1 : -1]
        support = torch.from_numpy(item.rollout.topk_token_ids.astype(np.int64))
        student = logits.gather(1, support).log_softmax(dim=-1)
        teacher = torch.from_numpy(item.scores.candidate_logprobs).double().log_softmax(dim=-1)
        total = total + (student.exp() * (student - teacher)).sum()
    (total / sum(item.num_response_tokens for item in scored)).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    found = gradient_of(model, scored, 50, ObjectiveConfig(score_top_k=6))
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def nan_scores(request: ScoreRequest, reply: ScoreReply) -> ScoreReply:
    if not request.rollout_id.endswith(".3"):
        return reply
    spoilt = reply.scores.candidate_logprobs.copy()
    spoilt[0, 0] = np.nan
    return dataclasses.replace(reply, scores=dataclasses.replace(reply.scores, candidate_logprobs=spoilt))


def test_non_finite_scores_stop_the_step_before_the_optimizer() -> None:
    setup = Setup()
    setup.client.alter = nan_scores
    before = setup.parameters()
    with pytest.raises(
        NonFiniteError, match=r"^step 1: rollout run\.0\.3 was not scored: .* candidate_logprobs are not finite$"
    ):
        run(setup)
    assert torch.equal(setup.parameters(), before)


def test_a_non_finite_student_stops_the_step_before_the_optimizer() -> None:
    setup = Setup()
    loop = setup.loop()
    scored = list(loop.run_step().scored)
    with torch.no_grad():
        setup.student_model.lm_head.weight[5, 0] = torch.inf
    before = setup.parameters()
    named = r"^the student's log-probs at response position 0 of rollout run\.0\.\d are not finite$"
    with pytest.raises(NonFiniteError, match=named):
        setup.accumulate(scored)
    assert all(parameter.grad is None for parameter in setup.student_model.parameters())
    assert torch.equal(setup.parameters().nan_to_num(), before.nan_to_num())


def test_a_non_finite_gradient_stops_the_step_before_the_optimizer() -> None:
    setup = Setup()
    loop = setup.loop()
    loss = setup.loss

    def exploding(batch: Any) -> Any:
        output = loss(batch)
        # Finite on the way forward, infinite on the way back.
        poisoned = output.loss_sum + setup.student_model.model.norm.weight.mul(0).abs().sqrt().sum()
        return dataclasses.replace(output, loss_sum=poisoned)

    loop._loss = exploding
    before = setup.parameters()
    with pytest.raises(NonFiniteError, match=r"^step 1: the gradient's norm is nan"):
        loop.run_step()
    assert torch.equal(setup.parameters(), before)
    assert loop.step == 0


def test_a_device_without_room_leaves_the_weights_and_names_the_settings() -> None:
    setup = Setup(num_steps=2)
    loop, calls, loss = setup.loop(), [], setup.loss

    def crowded(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")
        return loss(batch)

    loop._loss = crowded
    before = setup.parameters()
    named = (
        r"^step 1: the device is out of memory \(CUDA .* 2\.00 GiB\.\); lower .*max_micro_batch_tokens or .*row_chunk"
    )
    with pytest.raises(ConfigError, match=named):
        loop.run_step()
    assert torch.equal(setup.parameters(), before)
    assert (loop.step, loop.is_updating) == (0, False)


def test_an_update_without_room_for_its_moments_says_so_and_that_the_weights_are_of_no_step() -> None:
    """Adam's moments are first allocated in the first update, where memory is most likely to run out."""
    setup = Setup(num_steps=2)
    loop = setup.loop()

    def crowded(step: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    loop._optimizer.step = crowded
    with pytest.raises(ConfigError, match=r"^step 1: the device is out of memory \(CUDA .* 2\.00 GiB\.\); lower "):
        loop.run_step()
    assert (loop.step, loop.is_updating) == (0, True)


def refuse_two(request: ScoreRequest, reply: ScoreReply) -> ScoreReply:
    if request.rollout_id.endswith((".2", ".5")):
        raise DeadLetterError("took its replica down 3 times")
    return reply


def test_a_rollout_that_cannot_be_scored_ends_the_run_by_default() -> None:
    setup = Setup()
    setup.client.alter = refuse_two
    before = setup.parameters()
    with pytest.raises(DeadLetterError, match=r"^step 1: rollout run\.0\.[25] was not scored: took its replica down"):
        run(setup)
    assert torch.equal(setup.parameters(), before)


def test_a_rollout_that_cannot_be_scored_may_be_dropped_and_is_counted() -> None:
    setup = Setup(num_steps=1, drops_unscored=True)
    setup.client.alter = refuse_two
    loop = setup.loop()
    record = loop.run_step()
    assert (record.counts.sent, record.counts.scored, record.counts.lost) == (8, 6, 2)
    assert (loop.counts.sent, loop.counts.scored, loop.counts.lost) == (8, 6, 2)
    # The mean is over what was trained, not over what was sampled.
    trained = sum(item.num_response_tokens for item in record.scored)
    assert record.losses["loss/objective"].count == trained
    assert record.losses["loss/objective"].value == pytest.approx(step_kl(record), rel=1e-4)


def test_dropping_everything_is_an_error() -> None:
    setup = Setup(drops_unscored=True)

    def refuse(request: ScoreRequest, reply: ScoreReply) -> ScoreReply:
        raise DeadLetterError("no")

    setup.client.alter = refuse
    with pytest.raises(NonFiniteError, match=r"^step 1: no rollout was scored"):
        run(setup)


def test_a_lost_queue_ends_the_run_even_where_rollouts_may_be_dropped() -> None:
    setup = Setup(drops_unscored=True)

    def lose(request: ScoreRequest, reply: ScoreReply) -> ScoreReply:
        raise QueueUnavailableError("redis://h: lost for 120 s")

    setup.client.alter = lose
    with pytest.raises(QueueUnavailableError, match=r"^step 1: rollout run\.0\.0 was not scored: redis://h: lost"):
        run(setup)


def test_the_same_seed_is_the_same_run() -> None:
    def losses() -> list[float]:
        return [record.losses["loss/objective"].value for record in run(Setup(num_steps=3))]

    assert losses() == losses()


def test_every_kind_of_support_trains() -> None:
    for support in ("student", "teacher", "overlap", "non_overlap", "union"):
        setup = Setup(num_steps=1, objective=ObjectiveConfig(score_top_k=4, support=support))
        before = setup.parameters()
        record = run(setup)[0]
        assert math.isfinite(record.losses["loss/objective"].value)
        assert not torch.equal(setup.parameters(), before)


def test_the_teacher_answers_for_its_own_prompt() -> None:
    setup = Setup(num_steps=1, client=ExactClient(model=tiny_model(2)))
    record = run(setup)[0]
    request = setup.client.requests[0]
    item = next(item for item in record.scored if item.rollout.rollout_id == request.rollout_id)
    assert np.array_equal(request.candidate_token_ids, item.rollout.topk_token_ids)
    assert request.teacher_fingerprint == "teacher-1"
    assert build_batch([item]).num_positions == item.num_response_tokens
