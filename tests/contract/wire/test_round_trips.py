"""What travels is what arrives: records to bytes and back, and bytes that must never change their meaning."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.errors import DeadLetterError, InternalError, InvalidRequestError, OpdError, OverCapacityError
from opd.types import Capability, Encoding, ScoreReply, ScoreRequest, Scores, TeacherInfo
from opd.wire import messages
from opd.wire.pb import teacher_pb2 as pb


def assert_same(left: object, right: object) -> None:
    """Field by field, since arrays have no single truth value; NaN equals NaN."""
    assert type(left) is type(right)
    for field in dataclasses.fields(left):  # type: ignore[arg-type]
        one, other = getattr(left, field.name), getattr(right, field.name)
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
        elif dataclasses.is_dataclass(one):
            assert_same(one, other)
        else:
            assert one == other


@st.composite
def requests(draw: st.DrawFn) -> ScoreRequest:
    num_prompt, num_response = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_candidates = draw(st.integers(0, 4))
    return ScoreRequest(
        rollout_id=draw(st.text(min_size=1, max_size=20)),
        tenant="math",
        teacher="qwen",
        prompt_token_ids=generator.integers(0, 2**31 - 1, num_prompt, dtype=np.int32),
        response_token_ids=generator.integers(0, 2**31 - 1, num_response, dtype=np.int32),
        scored_rows=generator.random(num_response) < 0.5 if draw(st.booleans()) else None,
        candidate_token_ids=generator.integers(-1, 9, (num_response, num_candidates), dtype=np.int32)
        if draw(st.booleans())
        else None,
        score_top_k=draw(st.integers(0, 64)),
        wants_sampled=draw(st.booleans()),
        wants_entropy=draw(st.booleans()),
        teacher_temperature=draw(st.sampled_from([0.5, 1.0, 2.0])),
        encoding=draw(st.sampled_from(Encoding)),
        batch_invariant=draw(st.booleans()),
        timeout_ms=draw(st.integers(0, 2**31)),
        attempt=draw(st.integers(0, 9)),
        teacher_fingerprint=draw(st.sampled_from(["", "abc"])),
    )


@given(requests())
@settings(max_examples=50, deadline=None)
def test_request_round_trip(request: ScoreRequest) -> None:
    assert_same(messages.decode_request(messages.encode_request(request)), request)


def a_reply() -> ScoreReply:
    return ScoreReply(
        rollout_id="run.3.1",
        teacher_fingerprint="f00d",
        scores=Scores(
            sampled_logprobs=np.array([-0.5, np.nan], np.float32),
            candidate_logprobs=np.array([[-1.5, -2.0], [np.nan, -0.25]], np.float32),
            topk_token_ids=np.array([[4], [7]], np.int32),
            topk_logprobs=np.array([[-0.125], [-0.75]], np.float32),
            entropy=np.array([0.0, 2.5], np.float32),
        ),
        queue_ms=1.5,
        engine_ms=2.25,
        replica="r1",
    )


def its_request(encoding: Encoding = Encoding.FLOAT32, *, has_candidates: bool = True) -> ScoreRequest:
    """What `a_reply` answers; the first row's top-k is a candidate, the second's is not."""
    return ScoreRequest(
        rollout_id="run.3.1", tenant="math", teacher="qwen",
        prompt_token_ids=np.array([5, 9], np.int32), response_token_ids=np.array([4, 1], np.int32),
        candidate_token_ids=np.array([[4, 2], [-1, 3]], np.int32) if has_candidates else None,
        score_top_k=1, wants_entropy=True, encoding=encoding,
    )  # fmt: skip


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("has_candidates", [True, False])
def test_reply_round_trip(encoding: Encoding, has_candidates: bool) -> None:
    # Every value above is a float16, so that both encodings are lossless here.
    request = its_request(encoding, has_candidates=has_candidates)
    body = messages.encode_reply(a_reply(), request)
    assert_same(messages.decode_reply(body, request), a_reply())
    scores = pb.ScoreReply.FromString(body).scores
    assert scores.HasField("topk_by_candidates") == has_candidates == (not scores.HasField("topk_token_ids"))


def test_a_reply_told_by_candidates_is_refused_without_them() -> None:
    body = messages.encode_reply(a_reply(), its_request())
    with pytest.raises(InvalidRequestError, match="topk_by_candidates: the request had no candidates"):
        messages.decode_reply(body, its_request(has_candidates=False))


def test_float16_rounds_once_and_halves_the_bytes() -> None:
    values = np.linspace(-20, 0, 1000, dtype=np.float32)
    reply = dataclasses.replace(a_reply(), scores=Scores(sampled_logprobs=values))
    halved, whole = its_request(Encoding.FLOAT16), its_request(Encoding.FLOAT32)
    small, large = messages.encode_reply(reply, halved), messages.encode_reply(reply, whole)
    np.testing.assert_array_equal(
        messages.decode_reply(small, halved).scores.sampled_logprobs, values.astype(np.float16).astype(np.float32)
    )
    assert 1990 < len(large) - len(small) < 2010


def test_absent_is_none_and_not_empty() -> None:
    reply = dataclasses.replace(a_reply(), scores=Scores(entropy=np.zeros(0, np.float32)))
    decoded = messages.decode_reply(messages.encode_reply(reply, its_request()), its_request()).scores
    assert decoded.entropy is not None and decoded.entropy.shape == (0,)
    assert decoded.sampled_logprobs is None and decoded.topk_token_ids is None


def test_info_round_trip() -> None:
    info = TeacherInfo(
        teacher="qwen", fingerprint="f", model="m", engine="transformers", vocab_rows=512, num_defined_ids=500,
        id_map_hash="h", special_tokens={"eos_token": 2}, eos_token_ids=(2, 3), chat_template_hash="t",
        dtype="bfloat16", max_context=1024, max_candidates=64, max_score_top_k=64, max_batch_tokens=8192,
        max_message_bytes=2**33, capabilities=frozenset({Capability.ENTROPY, Capability.TEACHER_TOP_K}), version="1",
    )  # fmt: skip
    assert_same(messages.decode_info(messages.encode_info(info)), info)


def test_an_unknown_capability_is_left_out() -> None:
    message = messages.info_to_proto(TeacherInfo(teacher="t", fingerprint="", model="", engine="", vocab_rows=1,
                                                 num_defined_ids=1, id_map_hash=""))  # fmt: skip
    message.capabilities.extend(["entropy", "telepathy"])
    assert messages.info_from_proto(message).capabilities == {Capability.ENTROPY}


@pytest.mark.parametrize("error", [OverCapacityError("full", retry_after_s=1.5), DeadLetterError("gave up")])
def test_errors_travel_as_themselves(error: OpdError) -> None:
    delay_ms = round(1000 * (error.retry_after_s or 0))
    refusal = pb.Error(code=error.code, message=error.message, retryable=error.retryable, retry_after_ms=delay_ms)
    body = pb.ScoreReply(rollout_id="run.0.0", error=refusal).SerializeToString()
    with pytest.raises(type(error)) as caught:
        messages.decode_reply(body, its_request())
    assert (caught.value.message, caught.value.retry_after_s) == (error.message, error.retry_after_s)


def test_an_unknown_error_code_is_named() -> None:
    body = pb.ScoreReply(rollout_id="r", error=pb.Error(code="sunspots", message="m")).SerializeToString()
    with pytest.raises(InternalError, match="sunspots: m"):
        messages.decode_reply(body, its_request())


def test_golden_bytes_of_a_request() -> None:
    """A change here breaks every running pool: old replicas must read new trainers and the other way round."""
    request = ScoreRequest(
        rollout_id="run.1.2", tenant="math", teacher="qwen",
        prompt_token_ids=np.array([5, 9], np.int32), response_token_ids=np.array([7], np.int32),
        candidate_token_ids=np.array([[7, -1]], np.int32), score_top_k=2, wants_entropy=True,
    )  # fmt: skip
    expected = (
        "0a0772756e2e312e3222046d6174682a047177656e"
        "320a08061201021a01a62004"  # [5, 9] as 6 and 10, four bits each
        "3a0a08061201011a01082004"
        "4a0b0806120201021a01082004"  # [7, -1] as 8 and 0
        "50025d0000803f60016801700178019001e0a712"
    )
    assert messages.encode_request(request).hex() == expected


def test_golden_bytes_of_a_reply() -> None:
    """As above; both ways in which a top-k can travel."""
    coded = (
        "0a0772756e2e332e311204663030641a540a0b08031201021a0400b8007e12100803120202021a0800be00c0007e00b42a0b"
        "08031201021a04000000413a26080112090807120202021a01001a0a08061201021a01852004220b08031201021a0400b000"
        "ba2d0000c03f35000010403a027231"
    )
    plain = (
        "0a0772756e2e332e311204663030641a5b0a0f08021201021a08000000bf0000c07f12180802120202021a100000c0bf0000"
        "00c00000c07f000080be1a0b0806120202011a0185200422100802120202011a08000000be000040bf2a0f08021201021a08"
        "00000000000020402d0000c03f35000010403a027231"
    )
    assert messages.encode_reply(a_reply(), its_request(Encoding.FLOAT16)).hex() == coded
    assert messages.encode_reply(a_reply(), its_request(has_candidates=False)).hex() == plain


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A whole reply with a few bytes changed, cut out or put in."""
    body = bytearray(messages.encode_reply(a_reply(), its_request(draw(st.sampled_from(Encoding)))))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(body) - 1))
        body[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(body)


@given(mutations())
@settings(max_examples=500, deadline=None)
def test_a_damaged_reply_decodes_or_is_refused(body: bytes) -> None:
    try:
        messages.decode_reply(body, its_request())
    except OpdError as error:
        assert error.message


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"dtype": pb.DTYPE_FLOAT32}, "prompt_token_ids: dtype"),
        ({"shape": [2, 1]}, "prompt_token_ids: 2 dimensions"),
        ({"shape": [3]}, "prompt_token_ids: 8 bytes given"),
        ({"shape": [2**32 - 1]}, "prompt_token_ids: 8 bytes given"),
    ],
)
def test_a_malformed_array_is_named(change: dict[str, object], field: str) -> None:
    fields: dict[str, object] = {"dtype": pb.DTYPE_INT32, "shape": [2], "data": bytes(8)}
    message = pb.ScoreRequest(prompt_token_ids=pb.Array(**{**fields, **change}))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=field):
        messages.request_from_proto(message)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_decode_or_are_refused(body: bytes) -> None:
    decode_reply = partial(messages.decode_reply, request=its_request())
    for decode in (messages.decode_request, decode_reply, messages.decode_info):
        try:
            decode(body)
        except OpdError as error:
            assert error.message


def test_content_key_ignores_identity_and_sees_content() -> None:
    base = ScoreRequest(
        rollout_id="a.0.0", tenant="one", teacher="t",
        prompt_token_ids=np.array([1], np.int32), response_token_ids=np.array([2], np.int32),
    )  # fmt: skip
    same = dataclasses.replace(base, rollout_id="b.9.9", tenant="two", attempt=3, timeout_ms=1)
    other = dataclasses.replace(base, score_top_k=1)
    assert messages.content_key(base, "f") == messages.content_key(same, "f")
    assert messages.content_key(base, "f") != messages.content_key(other, "f")
    assert messages.content_key(base, "f") != messages.content_key(base, "g")
