"""The teacher's top-k, coded against the candidates: what is decoded is what was scored."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.errors import InvalidRequestError
from opd.types import PAD_ID, Encoding, Ids, Scores
from opd.wire import arrays
from opd.wire.pb import teacher_pb2 as pb
from opd.wire.topk_coding import can_encode_topk, decode_topk, encode_topk


def make_scores(logprobs_RV: np.ndarray, candidate_ids_RK: Ids, k: int) -> Scores:  # type: ignore[type-arg]
    """What an exact teacher answers: log-probs at the candidates, top-k with ties to the lower id."""
    topk_ids = np.argsort(-logprobs_RV, axis=1, kind="stable")[:, :k].astype(np.int32)
    candidates = np.take_along_axis(logprobs_RV, np.maximum(candidate_ids_RK, 0).astype(np.int64), axis=1)
    return Scores(
        candidate_logprobs=np.where(candidate_ids_RK == PAD_ID, np.nan, candidates).astype(np.float32),
        topk_token_ids=topk_ids,
        topk_logprobs=np.take_along_axis(logprobs_RV, topk_ids.astype(np.int64), axis=1),
    )


def round_trip(scores: Scores, candidate_ids: Ids, encoding: Encoding = Encoding.FLOAT32) -> tuple[Ids, np.ndarray]:  # type: ignore[type-arg]
    assert can_encode_topk(scores, candidate_ids) and scores.candidate_logprobs is not None
    message = pb.TopkByCandidates.FromString(encode_topk(scores, candidate_ids, encoding).SerializeToString())
    sent = arrays.decode_floats(arrays.encode_floats(scores.candidate_logprobs, encoding), "candidate_logprobs", 2)
    return decode_topk(message, candidate_ids, sent)


@st.composite
def scored(draw: st.DrawFn) -> tuple[Scores, Ids]:
    """Few different log-probs, so that ties abound; candidates with padding and repetitions; rows not scored."""
    num_rows, num_ids = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    k, num_candidates = draw(st.integers(1, num_ids)), draw(st.integers(0, 8))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    logprobs = -generator.integers(0, draw(st.sampled_from([3, 1000])), (num_rows, num_ids)).astype(np.float32) / 7
    candidate_ids = generator.integers(PAD_ID, num_ids, (num_rows, num_candidates), dtype=np.int32)
    scores = make_scores(logprobs, candidate_ids, k)
    if draw(st.booleans()):
        absent = generator.random(num_rows) < 0.5
        scores.topk_token_ids[absent], scores.topk_logprobs[absent] = PAD_ID, np.nan  # type: ignore[index]
        scores.candidate_logprobs[absent] = np.nan  # type: ignore[index]
    return scores, candidate_ids


@given(scored())
@settings(max_examples=300, deadline=None)
def test_float32_gives_back_exactly_what_was_scored(case: tuple[Scores, Ids]) -> None:
    scores, candidate_ids = case
    ids, logprobs = round_trip(scores, candidate_ids)
    np.testing.assert_array_equal(ids, scores.topk_token_ids)
    np.testing.assert_array_equal(logprobs, scores.topk_logprobs)
    assert (ids.dtype, logprobs.dtype) == (np.int32, np.float32)


@given(scored())
@settings(max_examples=200, deadline=None)
def test_float16_gives_back_the_same_set_in_the_order_of_its_values(case: tuple[Scores, Ids]) -> None:
    scores, candidate_ids = case
    ids, logprobs = round_trip(scores, candidate_ids, Encoding.FLOAT16)
    assert scores.topk_token_ids is not None and scores.topk_logprobs is not None
    for row in range(ids.shape[0]):
        rounded = scores.topk_logprobs[row].astype(np.float16).astype(np.float32).tolist()
        by_id = dict(zip(scores.topk_token_ids[row].tolist(), rounded, strict=True))
        if PAD_ID in by_id:
            assert (ids[row] == PAD_ID).all() and np.isnan(logprobs[row]).all()
            continue
        expected = sorted(by_id.items(), key=lambda pair: (-pair[1], pair[0]))
        assert list(zip(ids[row].tolist(), logprobs[row].tolist(), strict=True)) == expected


def test_log_probs_that_float16_makes_equal_come_in_the_order_of_their_ids() -> None:
    logprobs = np.array([[-9.0, -1.0002, -1.0, -1.0001]], np.float32)
    scores = make_scores(logprobs, np.array([[2]], np.int32), 3)
    assert scores.topk_token_ids is not None and scores.topk_token_ids.tolist() == [[2, 3, 1]]
    ids, values = round_trip(scores, np.array([[2]], np.int32), Encoding.FLOAT16)
    assert ids.tolist() == [[1, 2, 3]] and values.tolist() == [[-1.0, -1.0, -1.0]]


def test_only_those_that_are_no_candidates_travel() -> None:
    logprobs = np.log(np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], np.float32))
    candidates = np.array([[0, 2, PAD_ID], [3, 3, 0]], np.int32)
    message = encode_topk(make_scores(logprobs, candidates, 2), candidates, Encoding.FLOAT32)
    assert arrays.decode_mask(message.members, "m", 2).tolist() == [[True, False, False], [False, True, False]]
    assert arrays.decode_ids(message.other_token_ids, "o", 1).tolist() == [1, 2]
    assert not message.HasField("rows")


def test_both_zeros_are_equal_and_a_log_prob_rounded_above_zero_comes_first() -> None:
    # A normaliser in fp32 can leave 1e-7 above 0 where one token has all the mass.
    logprobs = np.array([[-1.0, 0.0, -0.0, 1e-7]], np.float32)
    candidates = np.array([[1, 0]], np.int32)
    ids, values = round_trip(make_scores(logprobs, candidates, 4), candidates)
    assert ids.tolist() == [[3, 1, 2, 0]]
    np.testing.assert_array_equal(values, logprobs[:, [3, 1, 2, 0]])


def test_a_candidate_scored_differently_from_the_top_k_travels_with_both_values() -> None:
    logprobs = np.log(np.array([[0.6, 0.4]], np.float32))
    candidates = np.array([[0, 1]], np.int32)
    scores = make_scores(logprobs, candidates, 2)
    off = dataclasses.replace(scores, candidate_logprobs=logprobs + np.array([[1e-3, 0]], np.float32))
    ids, values = round_trip(off, candidates)
    assert ids.tolist() == [[0, 1]]
    np.testing.assert_array_equal(values, logprobs)


@pytest.mark.parametrize(
    "changes",
    [
        {"topk_token_ids": None},
        {"topk_logprobs": None},
        {"candidate_logprobs": None},
        {"candidate_logprobs": np.zeros((2, 1), np.float32)},
        {"topk_token_ids": np.zeros((2, 0), np.int32), "topk_logprobs": np.zeros((2, 0), np.float32)},
        {"topk_token_ids": np.zeros((1, 2), np.int32), "topk_logprobs": np.zeros((1, 2), np.float32)},
        # A row with part of its top-k, and one without that has a value all the same.
        {"topk_token_ids": np.array([[1, -1], [0, 1]], np.int32)},
        {"topk_token_ids": np.array([[-1, -1], [0, 1]], np.int32)},
    ],
)
def test_what_the_coding_cannot_say_goes_plainly(changes: dict[str, object]) -> None:
    candidates = np.array([[0, 1], [2, 1]], np.int32)
    scores = make_scores(np.zeros((2, 3), np.float32), candidates, 2)
    assert can_encode_topk(scores, candidates) and not can_encode_topk(scores, None)
    assert not can_encode_topk(dataclasses.replace(scores, **changes), candidates)  # type: ignore[arg-type]


def coded() -> tuple[pb.TopkByCandidates, Ids, np.ndarray]:  # type: ignore[type-arg]
    candidates = np.array([[0, 1, PAD_ID], [2, 1, 0]], np.int32)
    scores = make_scores(np.log(np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], np.float32)), candidates, 2)
    assert scores.candidate_logprobs is not None
    return encode_topk(scores, candidates, Encoding.FLOAT32), candidates, scores.candidate_logprobs


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": 0}, "topk_by_candidates.k=0: with 2 rows it must lie between 1 and 8388608"),
        ({"k": 3}, "4 members, 0 other ids and 0 other log-probs do not make k=3 in 2 rows"),
        ({"k": 1}, "do not make k=1"),
        ({"k": 2**32 - 1}, "k=4294967295"),
        ({"members": arrays.encode_mask(np.zeros((2, 2), np.bool_))}, r"shape \(2, 2\), the request's candidates"),
        ({"members": arrays.encode_mask(np.zeros((3, 2), np.bool_))}, "members: shape"),
        ({"members": arrays.encode_mask(np.ones((2, 3), np.bool_))}, "members: marks a candidate that is -1"),
        ({"members": pb.Array(dtype=pb.DTYPE_BITS, shape=[2, 3], data=b"")}, "members: 0 bytes given"),
        ({"members": pb.Array(dtype=pb.DTYPE_BITS, shape=[2**32 - 1, 0])}, r"members: shape \(4294967295, 0\)"),
        ({"other_token_ids": arrays.encode_ids(np.array([1], np.int32))}, "1 other ids and 0 other log-probs"),
        ({"rows": arrays.encode_mask(np.ones(3, np.bool_))}, r"rows: shape \(3,\), expected \(2,\)"),
        ({"rows": arrays.encode_mask(np.array([True, False]))}, "4 members"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, object], reason: str) -> None:
    message, candidates, logprobs = coded()
    for name, value in change.items():
        if isinstance(value, int):
            setattr(message, name, value)
        else:
            getattr(message, name).CopyFrom(value)
    with pytest.raises(InvalidRequestError, match=reason):
        decode_topk(message, candidates, logprobs)


def test_candidates_of_another_request_are_refused() -> None:
    message, candidates, logprobs = coded()
    with pytest.raises(InvalidRequestError, match="candidate_logprobs: shape none, the request asked for"):
        decode_topk(message, candidates, None)
    with pytest.raises(InvalidRequestError, match="candidate_logprobs: shape"):
        decode_topk(message, candidates, logprobs[:, :2])
    with pytest.raises(InvalidRequestError, match="members: shape"):
        decode_topk(message, candidates[:1], logprobs[:1])
