"""Hidden states on the wire: exact values, chunks that make the reply again, and bytes that never change meaning."""

import dataclasses

import numpy as np
import pytest

from opd.errors import InternalError, InvalidRequestError, NonFiniteError, OverCapacityError, TeacherUnavailableError
from opd.types import Encoding, Floats, ScoreReply, ScoreRequest, Scores, SharedHead, TeacherInfo
from opd.wire import arrays, messages
from opd.wire.chunks import ReplyAssembly, split_reply
from opd.wire.heads import HeadPart, head_messages, head_part
from opd.wire.pb import teacher_pb2 as pb

ROWS, HIDDEN = 7, 4


def bfloat16(values: Floats) -> Floats:
    """Cut to the upper half of each float32."""
    return (values.astype("<f4").view("<u4") & 0xFFFF0000).view("<f4")


def hidden_states(seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((ROWS, HIDDEN)).astype(np.float32)


def a_request(**changes: object) -> ScoreRequest:
    fields: dict[str, object] = {
        "rollout_id": "run.1.2",
        "tenant": "math",
        "teacher": "qwen",
        "prompt_token_ids": np.array([5], np.int32),
        "response_token_ids": np.arange(ROWS, dtype=np.int32),
        "wants_hidden_states": True,
    }
    return ScoreRequest(**(fields | changes))  # type: ignore[arg-type]


def a_reply(**changes: object) -> ScoreReply:
    fields: dict[str, object] = {
        "sampled_logprobs": np.linspace(-2, 0, ROWS, dtype=np.float32),
        "topk_token_ids": np.arange(2 * ROWS, dtype=np.int32).reshape(ROWS, 2),
        "hidden_states": hidden_states(),
    }
    scores = Scores(**(fields | changes))  # type: ignore[arg-type]
    return ScoreReply(rollout_id="run.1.2", teacher_fingerprint="f00d", scores=scores, queue_ms=1.5, replica="r1")


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (hidden_states(), pb.DTYPE_FLOAT32),
        (bfloat16(hidden_states()), pb.DTYPE_BFLOAT16),
        (hidden_states().astype(np.float16).astype(np.float32), pb.DTYPE_FLOAT16),
        (np.array([[3e38, np.nan]], np.float32), pb.DTYPE_FLOAT32),
        (np.array([[np.nan, np.nan, np.inf, -0.0]], np.float32), pb.DTYPE_BFLOAT16),
    ],
)
def test_states_travel_in_the_narrowest_dtype_that_loses_nothing(values: Floats, dtype: int) -> None:
    message = arrays.encode_exact(values)
    assert message.dtype == dtype
    found = arrays.decode_exact(message, "hidden_states", 2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), values.view(np.uint32))


def test_golden_bytes_of_bfloat16_states() -> None:
    """1.0 is 3f80, -2.5 is c020: the upper halves of the float32, little-endian."""
    reply = ScoreReply(
        rollout_id="r", teacher_fingerprint="f", scores=Scores(hidden_states=np.array([[1.0, -2.5]], np.float32))
    )
    assert messages.encode_reply(reply, a_request()).hex() == "0a01721201661a0e320c080512020102" + "1a04803f20c0"
    np.testing.assert_array_equal(
        messages.decode_reply(messages.encode_reply(reply, a_request()), a_request()).scores.hidden_states,
        [[1.0, -2.5]],
    )


def test_log_probs_are_never_bfloat16() -> None:
    message = pb.ScoreReply(scores=pb.Scores(entropy=pb.Array(dtype=pb.DTYPE_BFLOAT16, shape=[1], data=bytes(2))))
    with pytest.raises(InvalidRequestError, match="entropy: dtype 5 is not accepted"):
        messages.reply_from_proto(message)


def test_the_wish_and_the_declarations_travel() -> None:
    assert messages.decode_request(messages.encode_request(a_request())).wants_hidden_states
    info = TeacherInfo(
        teacher="t", fingerprint="f", model="m", engine="e", vocab_rows=9, num_defined_ids=8, id_map_hash="h",
        hidden_size=4, output_head_hash="ab", logit_scale=0.1, logit_softcap=30.0,
    )  # fmt: skip
    assert messages.decode_info(messages.encode_info(info)) == info
    plain = dataclasses.replace(info, hidden_size=0, output_head_hash="", logit_scale=1.0, logit_softcap=None)
    assert messages.decode_info(messages.encode_info(plain)) == plain


def assembled(request: ScoreRequest, parts: list[pb.ScoreStreamResponse]) -> ScoreReply:
    assembly = ReplyAssembly(request)
    for part in parts:
        assembly.add(pb.ScoreStreamResponse.FromString(part.SerializeToString()))
    return assembly.finish()


@pytest.mark.parametrize("chunk_bytes", [1, 60, 100, 10_000])
def test_chunks_make_the_reply_again(chunk_bytes: int) -> None:
    parts = list(split_reply(a_reply(), Encoding.FLOAT32, chunk_bytes))
    assert len(parts) == {1: 7, 60: 4, 100: 3, 10_000: 1}[chunk_bytes]
    assert all(part.ByteSize() < max(chunk_bytes, 28) + 120 for part in parts)
    found = assembled(a_request(), parts)
    for name in ("sampled_logprobs", "topk_token_ids", "hidden_states"):
        np.testing.assert_array_equal(getattr(found.scores, name), getattr(a_reply().scores, name))
    assert (found.rollout_id, found.replica, found.queue_ms) == ("run.1.2", "r1", 1.5)
    assert found.scores.entropy is None


def three_parts() -> list[pb.ScoreStreamResponse]:
    return list(split_reply(a_reply(), Encoding.FLOAT32, 3 * 28))


def test_a_stream_that_was_cut_is_worth_a_retry() -> None:
    for parts in ([], three_parts()[:1], three_parts()[:2]):
        with pytest.raises(TeacherUnavailableError, match="the stream ended after") as caught:
            assembled(a_request(), parts)
        assert caught.value.retryable


def test_rows_out_of_order_missing_or_too_many_are_a_broken_stream() -> None:
    first, second, last = three_parts()
    for parts in ([second], [first, first], [first, last], [last, first]):
        with pytest.raises(InternalError, match=r"run\.1\.2: a broken stream, rows"):
            assembled(a_request(), parts)
    with pytest.raises(InternalError, match="row 6 came, 5 were asked for"):
        assembled(a_request(response_token_ids=np.arange(5, dtype=np.int32)), [first, second])
    with pytest.raises(InternalError, match=r"rows 7\+1 came after 7"):
        extra = pb.ScoreStreamResponse(first_row=7, reply=last.reply)
        assembled(a_request(response_token_ids=np.arange(9, dtype=np.int32)), [first, second, last, extra])


def test_parts_of_different_replies_are_not_mixed() -> None:
    first, second, _ = three_parts()
    other = pb.ScoreStreamResponse.FromString(second.SerializeToString())
    other.reply.teacher_fingerprint = "beef"
    with pytest.raises(InternalError, match="by beef are among them"):
        assembled(a_request(), [first, other])
    second.reply.scores.ClearField("topk_token_ids")
    with pytest.raises(InternalError, match="row 3 has other fields or widths"):
        assembled(a_request(), [first, second])


def test_a_refusal_in_the_stream_is_raised_as_itself() -> None:
    refusal = pb.ScoreStreamResponse(
        reply=pb.ScoreReply(rollout_id="run.1.2", error=pb.Error(code="over_capacity", message="full"))
    )
    with pytest.raises(OverCapacityError, match="full"):
        assembled(a_request(), [refusal])


def test_states_that_are_no_numbers_are_named_where_they_were_to_be_scored() -> None:
    broken = hidden_states()
    broken[4, 1] = np.nan
    parts = list(split_reply(a_reply(hidden_states=broken), Encoding.FLOAT32, 60))
    with pytest.raises(NonFiniteError, match="hidden states of 1 rows are NaN or infinite, first of row 4"):
        assembled(a_request(), parts)
    scored = np.arange(ROWS) != 4
    assert assembled(a_request(scored_rows=scored), parts).scores.hidden_states is not None
    with pytest.raises(InternalError, match="were asked for and did not come"):
        assembled(a_request(), list(split_reply(a_reply(hidden_states=None), Encoding.FLOAT32, 60)))


def a_head(bias: bytes = b"") -> SharedHead:
    return SharedHead(weight=memoryview(bytes(range(24))), bias=bias, shape=(3, 4), dtype="bfloat16", sha256="ab")


@pytest.mark.parametrize(("offset", "starts"), [(0, [0, 10, 20]), (10, [10, 20]), (15, [15]), (24, [24])])
def test_a_head_travels_from_any_byte_on(offset: int, starts: list[int]) -> None:
    parts = [head_part(message) for message in head_messages(a_head(b"bias.."), offset, 10)]
    assert [part.offset_bytes for part in parts] == starts
    assert b"".join(part.data for part in parts) == bytes(range(offset, 24))
    assert [part.bias for part in parts] == [b"bias..", *(b"" for _ in starts[1:])]
    assert (parts[0].shape, parts[0].dtype, parts[0].sha256) == ((3, 4), "bfloat16", "ab")


def test_golden_bytes_of_a_head_part() -> None:
    (message,) = head_messages(a_head(b"b"), 22, 10)
    assert message.SerializeToString().hex() == "0a02616212020304180520162a0216173201" + "62"
    assert head_part(message) == HeadPart(
        sha256="ab", shape=(3, 4), dtype="bfloat16", offset_bytes=22, data=b"\x16\x17", bias=b"b"
    )


def test_what_is_no_head_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="offset_bytes=25: the weight has 24"):
        head_messages(a_head(), 25, 10)
    for message in (pb.GetOutputHeadResponse(), pb.GetOutputHeadResponse(dtype=pb.DTYPE_INT32, shape=[1, 2])):
        with pytest.raises(InternalError, match="a matrix of float32"):
            head_part(message)
