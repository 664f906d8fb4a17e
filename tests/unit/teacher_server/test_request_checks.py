from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from opd.errors import InvalidRequestError, UnknownTeacherError, UnsupportedError
from opd.types import PAD_ID, Capability, Encoding, ScoreReply, Scores
from opd.wire.messages import encode_reply
from services.teacher_server.request_checks import check_request, reply_bytes
from tests.unit.teacher_server.fake_engine import FakeEngine, fake_info
from tests.unit.teacher_server.tiny_teachers import make_request


def ids(*values: int) -> Any:
    return np.array(values, np.int32)


def test_a_good_request_passes_with_everything_it_may_ask() -> None:
    candidates = np.full((7, 8), PAD_ID, np.int32)
    candidates[:, 0] = 89
    request = make_request(candidate_token_ids=candidates, score_top_k=16, wants_entropy=True, batch_invariant=True)
    check_request(replace(request, scored_rows=np.ones(7, np.bool_), teacher_fingerprint="f" * 16), fake_info())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_id": ""}, "rollout_id='': give 1 to 200"),
        ({"rollout_id": "a b"}, "rollout_id='a b'"),
        ({"rollout_id": "x" * 201}, "rollout_id="),
        ({"tenant": "Math!"}, r"tenant='Math!': names are \[a-z0-9-\]"),
        ({"tenant": "a" * 64}, "tenant="),
        ({"prompt_token_ids": ids()}, r"prompt_token_ids=shape \(0,\): at least one token"),
        ({"response_token_ids": ids()}, "response_token_ids=shape"),
        ({"prompt_token_ids": ids(3, 90)}, r"prompt_token_ids\[1\]=90: ids are 0 to 89"),
        ({"response_token_ids": ids(3, 4, -1)}, r"response_token_ids\[2\]=-1: ids are 0 to 89"),
        ({"response_token_ids": ids(*[1] * 124)}, "129 tokens: the context holds 128"),
        ({"scored_rows": np.ones(6, np.bool_)}, r"scored_rows=shape \(6,\): the response has 7"),
        ({"candidate_token_ids": np.ones((6, 2), np.int32)}, r"candidate_token_ids=shape \(6, 2\): expected \(7, K\)"),
        ({"candidate_token_ids": np.ones((7, 0), np.int32)}, "candidate_token_ids=shape"),
        ({"candidate_token_ids": np.ones((7, 9), np.int32)}, "candidate_token_ids=K=9: at most 8"),
        (
            {"candidate_token_ids": np.full((7, 1), 90, np.int32)},
            r"candidate_token_ids\[0, 0\]=90: .*or -1 for padding",
        ),
        ({"candidate_token_ids": np.full((7, 1), -2, np.int32)}, r"candidate_token_ids\[0, 0\]=-2"),
        ({"score_top_k": 17}, "score_top_k=17: give 0 to 16"),
        ({"teacher_temperature": 0.0}, "teacher_temperature=0.0: give 0.001 to 1000"),
        ({"teacher_temperature": -1.0}, "teacher_temperature=-1.0"),
        ({"teacher_temperature": float("nan")}, "teacher_temperature=nan"),
        ({"teacher_temperature": float("inf")}, "teacher_temperature=inf"),
        ({"timeout_ms": 0}, "timeout_ms=0: give 1 to"),
        ({"timeout_ms": 1 << 31}, "timeout_ms=2147483648"),
        ({"wants_sampled": False}, "nothing is asked for"),
    ],
    ids=str,
)
def test_a_bad_request_is_refused_with_field_value_and_limit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        check_request(replace(make_request(), **changes), fake_info())
    assert "\n" not in caught.value.message and not caught.value.retryable


def test_another_teacher_or_fingerprint_is_refused_naming_both() -> None:
    with pytest.raises(UnknownTeacherError, match="teacher='big': this replica serves 'tiny'"):
        check_request(make_request(teacher="big"), fake_info())
    with pytest.raises(UnknownTeacherError, match=f"'abc': this replica serves tiny@{'f' * 16}"):
        check_request(make_request(teacher_fingerprint="abc"), fake_info())


@pytest.mark.parametrize(
    ("capability", "changes"),
    [
        (Capability.SAMPLED_LOGPROBS, {}),
        (Capability.CANDIDATE_LOGPROBS, {"candidate_token_ids": np.ones((7, 1), np.int32)}),
        (Capability.TEACHER_TOP_K, {"score_top_k": 1}),
        (Capability.ENTROPY, {"wants_entropy": True}),
        (Capability.TEACHER_TEMPERATURE, {"teacher_temperature": 0.5}),
        (Capability.BATCH_INVARIANT, {"batch_invariant": True}),
    ],
)
def test_an_absent_capability_is_refused_by_name(capability: Capability, changes: dict[str, Any]) -> None:
    info = fake_info(capabilities=frozenset(Capability) - {capability})
    with pytest.raises(UnsupportedError, match=f"^{capability}: the fake engine of tiny does not supply it exactly"):
        check_request(make_request(**changes), info)


def test_an_answer_over_the_message_limit_is_refused_with_both_numbers() -> None:
    request = make_request(score_top_k=16, num_response=100)
    with pytest.raises(InvalidRequestError, match=r"an answer of about \d+ bytes: a message holds 5000"):
        check_request(request, fake_info(max_message_bytes=5000))
    check_request(replace(request, score_top_k=4), fake_info(max_message_bytes=5000))


@pytest.mark.parametrize("overlap", [0, 4, 8])
@pytest.mark.parametrize("encoding", Encoding)
def test_the_bound_holds_however_much_of_the_top_k_the_candidates_say(encoding: Encoding, overlap: int) -> None:
    # Every row has candidates 74..81 and a top-k of eight ids that begins `overlap` before their end.
    rows, start = 100, 8 - overlap
    candidates = np.tile(np.arange(74, 82, dtype=np.int32), (rows, 1))
    request = make_request(num_response=rows, encoding=encoding, candidate_token_ids=candidates, score_top_k=8)
    logprobs = np.linspace(-5, -1, 90, dtype=np.float32)[::-1]
    scores = Scores(
        candidate_logprobs=logprobs[candidates],
        topk_token_ids=candidates + start,
        topk_logprobs=logprobs[candidates + start],
    )
    reply = ScoreReply(rollout_id="r", teacher_fingerprint="f", scores=scores)
    size, bound = len(encode_reply(reply, request)), reply_bytes(replace(request, wants_sampled=False), 90)
    # The bound cannot know the overlap: it is what an answer without any takes.
    saved = rows * overlap * ((2 if encoding is Encoding.FLOAT16 else 4) + 7 / 8)
    assert size <= bound <= size + saved + 1024


@pytest.mark.parametrize("encoding", Encoding)
def test_the_size_of_an_answer_is_bounded_from_above(encoding: Encoding) -> None:
    request = make_request(num_response=100, encoding=encoding)
    (scores,) = FakeEngine().score([request])
    reply = ScoreReply(rollout_id=request.rollout_id, teacher_fingerprint="f" * 16, scores=scores, replica="r" * 60)  # type: ignore[arg-type]
    size = len(encode_reply(reply, request))
    assert size <= reply_bytes(request, 90) <= size + 1024
