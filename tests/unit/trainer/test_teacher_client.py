"""The handshake, what is asked of each rollout, and what is accepted as an answer."""

import dataclasses
import time

import numpy as np
import pytest

from opd.errors import (
    InternalError,
    NonFiniteError,
    PermissionDeniedError,
    QueueUnavailableError,
    TeacherUnavailableError,
    UnsupportedError,
    VocabularyMismatchError,
)
from opd.types import Capability, Rollout, ScoreReply, ScoreRequest, TeacherInfo
from services.trainer.loop import TrainingLoop
from tests.unit.trainer.test_batch import scored
from tests.unit.trainer.tiny_training import TEACHER_INFO, ExactClient, Setup, teacher_client, tiny_model


class InfoClient(ExactClient):
    """Only who serves matters; `answers` are told one after the other, the last one for good."""

    def __init__(self, *answers: TeacherInfo | Exception) -> None:
        super().__init__(model=None)
        self.answers = list(answers)

    def info(self) -> TeacherInfo:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


NOBODY = TeacherUnavailableError("pool pool has no replica")


def info(**changes: object) -> TeacherInfo:
    return dataclasses.replace(TEACHER_INFO, **changes)


def test_the_handshake_waits_for_the_first_replica_and_says_so() -> None:
    told: list[str] = []
    client = teacher_client(InfoClient(NOBODY, NOBODY, TEACHER_INFO))
    assert client.shake_hands(wait_s=30, on_wait=told.append) is TEACHER_INFO
    assert len(told) == 1 and told[0].startswith("waiting for a replica of teacher pool pool (")


def test_the_wait_for_a_replica_is_bounded() -> None:
    begun = time.monotonic()
    with pytest.raises(
        TeacherUnavailableError, match=r"^teacher pool pool: no replica within 1 s .*`opd teacher serve`"
    ):
        teacher_client(InfoClient(NOBODY)).shake_hands(wait_s=1)
    assert 0.9 < time.monotonic() - begun < 5


def test_a_queue_that_is_not_there_is_not_waited_for() -> None:
    with pytest.raises(QueueUnavailableError):
        teacher_client(InfoClient(QueueUnavailableError("redis://h: refused"))).shake_hands(wait_s=30)


def test_another_id_map_is_refused_naming_both_sides() -> None:
    other = info(id_map_hash="x" * 32, model="other-7b", num_defined_ids=99)
    with pytest.raises(
        VocabularyMismatchError,
        match=r"^student tiny \(24 ids, map mmmmmmmmmmmm\) and teacher other-7b \(99 ids, map xxxxxxxxxxxx\)",
    ):
        teacher_client(InfoClient(other)).shake_hands(wait_s=30)


def test_another_template_or_eos_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    teacher_client(InfoClient(info(chat_template_hash="u", eos_token_ids=(7,)))).shake_hands(wait_s=0)
    assert "different chat templates" in caplog.text
    assert "student EOS 1 is none of the teacher's [7]" in caplog.text


@pytest.mark.parametrize(
    ("changes", "wants", "message"),
    [
        ({"max_score_top_k": 4}, {}, r"^objective\.score_top_k=6: teacher pool takes at most 4; lower it$"),
        ({"max_candidates": 5}, {}, r"^objective\.score_top_k=6: teacher pool takes at most 5"),
        (
            {"max_context": 100},
            {"max_context": 101},
            r"^rollout\.max_prompt_tokens \+ max_response_tokens=101: teacher pool takes at most 100",
        ),
        (
            {"max_context": 100},
            {"max_context": 90, "longest_prompt": "prompt 3 of sums", "longest_context": 101},
            r"^prompt 3 of sums: .* it is 101 tokens, teacher pool takes at most 100; shorten data\.teacher_context",
        ),
        (
            {"capabilities": frozenset(Capability) - {Capability.CANDIDATE_LOGPROBS}},
            {},
            r"^teacher pool \(exact\) cannot supply candidate_logprobs;",
        ),
        (
            {"capabilities": frozenset(Capability) - {Capability.BATCH_INVARIANT, Capability.TEACHER_TEMPERATURE}},
            {"batch_invariant": True, "teacher_temperature": 0.5},
            r"cannot supply batch_invariant, teacher_temperature;",
        ),
    ],
)
def test_a_teacher_that_cannot_do_it_is_refused(
    changes: dict[str, object], wants: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        teacher_client(InfoClient(info(**changes)), **wants).shake_hands(wait_s=30)


def test_limits_that_are_not_stated_do_not_bind() -> None:
    unlimited = info(max_score_top_k=0, max_candidates=0, max_context=0)
    assert teacher_client(InfoClient(unlimited), max_context=10**6).shake_hands(wait_s=0) is unlimited


def test_what_is_not_needed_may_be_missing() -> None:
    enough = {Capability.SAMPLED_LOGPROBS, Capability.CANDIDATE_LOGPROBS, Capability.TEACHER_TOP_K}
    client = InfoClient(info(capabilities=frozenset(enough)))
    client.model = tiny_model(2)
    teacher = teacher_client(client)
    teacher.shake_hands(wait_s=0)
    teacher.send(some_rollout(), some_rollout().prompt_token_ids)
    assert client.requests[0].wants_entropy is False


BARE = frozenset({Capability.SAMPLED_LOGPROBS, Capability.TEACHER_TOP_K})
"""What vLLM on a CPU supplies."""


def test_a_teacher_without_candidates_can_be_trained_with_where_they_are_not_needed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = InfoClient(info(capabilities=BARE, max_candidates=4))
    client.model = tiny_model(2)
    teacher = teacher_client(client, needs=frozenset({Capability.SAMPLED_LOGPROBS}))
    teacher.shake_hands(wait_s=0)
    teacher.pin()
    rollout = some_rollout()
    reply = teacher.send(rollout, rollout.prompt_token_ids).result()
    (request,) = client.requests
    assert request.candidate_token_ids is None and not request.wants_entropy
    assert (request.wants_sampled, request.score_top_k) == (True, 6)
    assert teacher.accept(rollout, reply).candidate_logprobs is None
    (line,) = [record.getMessage() for record in caplog.records if "absent" in record.getMessage()]
    assert line == (
        "teacher pool (exact) does not supply candidate_logprobs, entropy, so these metrics are absent: "
        "loss/reverse_kl, distill/extreme_prob_gap, distill/entropy_teacher, distill/entropy_gap"
    )


def test_a_full_teacher_is_asked_for_the_metrics_too(caplog: pytest.LogCaptureFixture) -> None:
    client = ExactClient(model=tiny_model(2))
    teacher = teacher_client(client, needs=frozenset({Capability.SAMPLED_LOGPROBS}))
    teacher.shake_hands(wait_s=0)
    rollout = some_rollout()
    scores = teacher.accept(rollout, teacher.send(rollout, rollout.prompt_token_ids).result())
    assert scores.candidate_logprobs is not None and scores.entropy is not None and scores.topk_logprobs is not None
    assert client.requests[0].wants_hidden_states is False, "what is costly is asked for only where it is needed"
    assert "absent" not in caplog.text


def test_what_the_objective_needs_cannot_be_left_out() -> None:
    for needs in (Capability.CANDIDATE_LOGPROBS, Capability.HIDDEN_STATES):
        with pytest.raises(UnsupportedError, match=rf"^teacher pool \(exact\) cannot supply {needs};"):
            teacher_client(InfoClient(info(capabilities=BARE)), needs=frozenset({needs})).shake_hands(wait_s=0)


def test_a_right_is_tried_by_using_it() -> None:
    def refuse(request: ScoreRequest, reply: ScoreReply) -> ScoreReply:
        if request.wants_hidden_states:
            raise PermissionDeniedError("tenant: has no right to hidden states")
        return reply

    client = ExactClient(model=tiny_model(2), alter=refuse)
    for needs in (Capability.SAMPLED_LOGPROBS, Capability.HIDDEN_STATES):
        teacher = teacher_client(client, needs=frozenset({needs}))
        teacher.shake_hands(wait_s=0)
        if needs is Capability.SAMPLED_LOGPROBS:
            teacher.try_scoring("probe-1.0.0")
            continue
        with pytest.raises(PermissionDeniedError, match="no right to hidden states"):
            teacher.try_scoring("probe-2.0.0")
    assert [request.num_tokens for request in client.requests] == [2, 2]


def some_rollout() -> Rollout:
    return scored("run.0.0", [5, 6], [8, 9, 1], k=6).rollout


def test_a_request_asks_for_everything_a_step_needs() -> None:
    client = ExactClient(model=tiny_model(2))
    teacher = teacher_client(client, teacher_temperature=0.5, batch_invariant=True, timeout_ms=1234)
    teacher.shake_hands(wait_s=0)
    rollout = some_rollout()
    teacher.send(rollout, np.array([4, 4, 4], np.int32)).result()
    (request,) = client.requests
    assert (request.rollout_id, request.tenant, request.teacher) == ("run.0.0", "tenant", "pool")
    assert request.prompt_token_ids.tolist() == [4, 4, 4]
    assert np.array_equal(request.candidate_token_ids, rollout.topk_token_ids)
    assert (request.score_top_k, request.wants_sampled, request.wants_entropy) == (6, True, True)
    assert (request.teacher_temperature, request.batch_invariant, request.timeout_ms) == (0.5, True, 1234)
    assert request.teacher_fingerprint == "teacher-1"


def reply_for(request_rollout: Rollout, **changes: object) -> ScoreReply:
    item = scored("run.0.0", [5, 6], [8, 9, 1], k=6)
    scores = dataclasses.replace(item.scores, **changes)
    return ScoreReply(rollout_id="run.0.0", teacher_fingerprint="teacher-1", scores=scores)


def test_an_answer_has_to_fit_its_rollout() -> None:
    teacher = teacher_client(ExactClient(model=None))
    teacher.shake_hands(wait_s=0)
    rollout = some_rollout()
    assert teacher.accept(rollout, reply_for(rollout)).topk_token_ids is not None
    with pytest.raises(InternalError, match=r"^rollout run\.0\.0: teacher candidate_logprobs are nothing instead of"):
        teacher.accept(rollout, reply_for(rollout, candidate_logprobs=None))
    with pytest.raises(InternalError, match=r"teacher topk_logprobs are \(3, 5\) instead of \(3, 6\)$"):
        teacher.accept(rollout, reply_for(rollout, topk_logprobs=np.zeros((3, 5), np.float32)))
    with pytest.raises(NonFiniteError, match=r"^rollout run\.0\.0: teacher sampled_logprobs are not finite$"):
        teacher.accept(rollout, reply_for(rollout, sampled_logprobs=np.array([0, np.nan, 0], np.float32)))
    other = dataclasses.replace(reply_for(rollout), teacher_fingerprint="teacher-2")
    with pytest.raises(InternalError, match=r"scored by teacher teacher-2 and not by the pinned teacher-1$"):
        teacher.accept(rollout, other)


def test_a_step_asks_one_teacher_only_and_the_next_may_have_another() -> None:
    """The pool is upgraded while the first step is under way."""
    setup = Setup(num_steps=2)
    upgraded = info(fingerprint="teacher-2")

    def upgrade(request: ScoreRequest) -> None:
        setup.client.current_info = upgraded

    setup.client.on_submit = upgrade
    loop: TrainingLoop = setup.loop()
    loop.run(lambda record: None)
    asked = [request.teacher_fingerprint for request in setup.client.requests]
    assert asked == ["teacher-1"] * 8 + ["teacher-2"] * 8


def test_an_answer_is_held_to_what_the_teacher_of_its_time_was_asked() -> None:
    """With a lag a step may be sent to one teacher and come back when the next is pinned."""
    client = ExactClient(model=tiny_model(2), current_info=info(capabilities=BARE))
    teacher = teacher_client(client, needs=frozenset({Capability.SAMPLED_LOGPROBS}))
    teacher.shake_hands(wait_s=0)
    rollout, pinned = some_rollout(), teacher.pin()
    reply = teacher.send(rollout, rollout.prompt_token_ids).result()
    client.current_info = info(fingerprint="teacher-2")
    assert teacher.pin() == "teacher-2"
    assert teacher.accept(rollout, reply, pinned).candidate_logprobs is None


def test_an_upgrade_to_another_vocabulary_ends_the_run() -> None:
    client = InfoClient(TEACHER_INFO, info(fingerprint="teacher-2", id_map_hash="x" * 32))
    teacher = teacher_client(client)
    teacher.shake_hands(wait_s=0)
    with pytest.raises(VocabularyMismatchError):
        teacher.pin()


def test_a_step_begins_while_nobody_serves() -> None:
    teacher = teacher_client(InfoClient(TEACHER_INFO, NOBODY))
    teacher.shake_hands(wait_s=0)
    assert teacher.pin() == "teacher-1"


def test_asking_before_the_handshake_is_our_own_fault() -> None:
    with pytest.raises(InternalError, match="before the handshake"):
        teacher_client(ExactClient(model=None)).pin()


def test_only_another_teacher_is_worth_a_warning_and_one_that_moves_is_pinned_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = [info(fingerprint=name) for name in ("ab+0", "ab+1", "ab+2", "cd+2")]
    client = teacher_client(InfoClient(*given))
    client.shake_hands(wait_s=0)
    assert [client.pin(), client.pin()] == ["ab+1", "ab+2"] and not caplog.records
    assert client.pin() == "cd+2"
    assert caplog.messages == ["teacher changed from ab+2 to cd+2"]
