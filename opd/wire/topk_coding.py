"""The teacher's top-k told by what the receiver knows already: the candidates it asked about.

R response rows, K candidates, k teacher top-k, N top-k tokens that are no candidates. Student and teacher agree on most
of the likely tokens, and the log-probs of the candidates travel anyway. So one bit a candidate says whether it is in
the top-k, and only the N others travel as id and log-prob. The receiver puts each row in order again: by log-prob
downwards and, among equals, by id upwards. The set is exact in every encoding; log-probs that float16 made equal come
back in the order of their ids.
"""

import numpy as np
from numpy.typing import NDArray

from opd.errors import InvalidRequestError
from opd.types import PAD_ID, Encoding, Floats, Ids, Mask, Scores
from opd.wire import arrays
from opd.wire.pb import teacher_pb2 as pb


def encode_topk(scores: Scores, candidate_ids_RK: Ids, encoding: Encoding) -> pb.TopkByCandidates:
    """Needs top-k and candidate log-probs in `scores`, for the same rows as the candidates.

    A candidate whose log-prob differs from the one under which it stands in the top-k counts as an other, so nothing
    depends on how the engine computed either.
    """
    assert scores.topk_token_ids is not None and scores.topk_logprobs is not None
    assert scores.candidate_logprobs is not None
    topk_ids_Rk, topk_Rk = scores.topk_token_ids, scores.topk_logprobs
    rows, columns, places = _find_shared(candidate_ids_RK, topk_ids_Rk)
    is_same = scores.candidate_logprobs[rows, columns] == topk_Rk[rows, places]
    is_member_RK = np.zeros(candidate_ids_RK.shape, np.bool_)
    is_member_RK[rows[is_same], columns[is_same]] = True
    is_other_Rk = topk_ids_Rk != PAD_ID
    is_other_Rk[rows[is_same], places[is_same]] = False
    has_topk_R = (topk_ids_Rk != PAD_ID).all(axis=1)
    message = pb.TopkByCandidates(
        k=topk_ids_Rk.shape[1],
        members=arrays.encode_mask(is_member_RK),
        other_token_ids=arrays.encode_ids(topk_ids_Rk[is_other_Rk]),
        other_logprobs=arrays.encode_floats(topk_Rk[is_other_Rk], encoding),
    )
    if not has_topk_R.all():
        message.rows.CopyFrom(arrays.encode_mask(has_topk_R))
    return message


def can_encode_topk(scores: Scores, candidate_ids_RK: Ids | None) -> bool:
    """Whether everything the coding needs is there, and each row has all of its top-k or nothing of it."""
    if scores.topk_token_ids is None or scores.topk_logprobs is None or scores.candidate_logprobs is None:
        return False
    if max(scores.candidate_logprobs.size, scores.topk_token_ids.size) > arrays.MAX_PACKED_ELEMENTS:
        return False
    if candidate_ids_RK is None or candidate_ids_RK.shape != scores.candidate_logprobs.shape:
        return False
    if scores.topk_token_ids.shape != scores.topk_logprobs.shape or scores.topk_token_ids.shape[1] == 0:
        return False
    if scores.topk_token_ids.shape[0] != candidate_ids_RK.shape[0]:
        return False
    is_token_Rk = scores.topk_token_ids != PAD_ID
    is_whole = is_token_Rk.all(axis=1) | ~is_token_Rk.any(axis=1)
    # The log-probs of rows without tokens do not travel, so they must be what the receiver puts there.
    return bool(is_whole.all() and np.isnan(scores.topk_logprobs[~is_token_Rk]).all())


def decode_topk(
    message: pb.TopkByCandidates, candidate_ids_RK: Ids, candidate_logprobs_RK: Floats | None
) -> tuple[Ids, Floats]:
    """Ids [R, k] and log-probs [R, k], most likely first, ties to the lower id; rows without top-k are -1 and NaN.

    Raises InvalidRequestError when the parts do not fit each other or the candidates.
    """
    is_member_RK, has_topk_R = _masks(message, candidate_ids_RK, candidate_logprobs_RK)
    assert candidate_logprobs_RK is not None
    other_ids_N = arrays.decode_ids(message.other_token_ids, "other_token_ids", 1)
    others_N = arrays.decode_floats(message.other_logprobs, "other_logprobs", 1)
    k, num_members_R = _bounded_k(message, has_topk_R.size), is_member_RK.sum(axis=1)
    num_expected = int(has_topk_R.sum()) * k - int(num_members_R.sum())
    if (num_members_R > np.where(has_topk_R, k, 0)).any() or not other_ids_N.size == others_N.size == num_expected:
        raise InvalidRequestError(
            f"topk_by_candidates: {int(num_members_R.sum())} members, {other_ids_N.size} other ids and "
            f"{others_N.size} other log-probs do not make k={k} in {int(has_topk_R.sum())} rows; send k in each"
        )
    ids_Rk = np.full((has_topk_R.size, k), PAD_ID, np.int32)
    logprobs_Rk = np.full((has_topk_R.size, k), np.nan, np.float32)
    place_k = np.arange(k)
    is_member_Rk = place_k < num_members_R[:, None]
    is_other_Rk = ~is_member_Rk & has_topk_R[:, None]
    ids_Rk[is_member_Rk], ids_Rk[is_other_Rk] = candidate_ids_RK[is_member_RK], other_ids_N
    logprobs_Rk[is_member_Rk], logprobs_Rk[is_other_Rk] = candidate_logprobs_RK[is_member_RK], others_N
    return _in_order(ids_Rk, logprobs_Rk)


def _bounded_k(message: pb.TopkByCandidates, num_rows: int) -> int:
    """What is not sent is not counted by the message's size, so k has a bound of its own."""
    if not 1 <= message.k <= arrays.MAX_PACKED_ELEMENTS // max(1, num_rows):
        raise InvalidRequestError(
            f"topk_by_candidates.k={message.k}: with {num_rows} rows it must lie between 1 and "
            f"{arrays.MAX_PACKED_ELEMENTS // max(1, num_rows)}"
        )
    return message.k


def _masks(
    message: pb.TopkByCandidates, candidate_ids_RK: Ids, candidate_logprobs_RK: Floats | None
) -> tuple[Mask, Mask]:
    """Members [R, K] and rows with a top-k [R], of the candidates' own shape."""
    shape = candidate_ids_RK.shape
    if candidate_logprobs_RK is None or candidate_logprobs_RK.shape != shape:
        found = "none" if candidate_logprobs_RK is None else str(candidate_logprobs_RK.shape)
        raise InvalidRequestError(f"candidate_logprobs: shape {found}, the request asked for {shape}")
    # Shapes are compared before anything is unpacked, since what follows allocates by them.
    if tuple(message.members.shape) != shape:
        raise InvalidRequestError(
            f"topk_by_candidates.members: shape {tuple(message.members.shape)}, the request's candidates have {shape}"
        )
    is_member_RK = arrays.decode_mask(message.members, "topk_by_candidates.members", 2)
    if (candidate_ids_RK[is_member_RK] == PAD_ID).any():
        raise InvalidRequestError(f"topk_by_candidates.members: marks a candidate that is {PAD_ID}, padding")
    if not message.HasField("rows"):
        return is_member_RK, np.ones(shape[0], np.bool_)
    if tuple(message.rows.shape) != shape[:1]:
        raise InvalidRequestError(f"topk_by_candidates.rows: shape {tuple(message.rows.shape)}, expected {shape[:1]}")
    return is_member_RK, arrays.decode_mask(message.rows, "topk_by_candidates.rows", 1)


def _find_shared(
    candidate_ids_RK: Ids, topk_ids_Rk: Ids
) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64]]:
    """Row, candidate column and place in the top-k of each id that stands in both; no column and no place twice.

    Ids are sorted row by row with candidates before top-k among equals: what is in both are then neighbours.
    """
    num_candidates = candidate_ids_RK.shape[1]
    ids = np.concatenate([candidate_ids_RK, topk_ids_Rk], axis=1).astype(np.int64)
    keys = np.sort(ids << 32 | np.arange(ids.shape[1]), axis=1)
    ids, tags = keys >> 32, keys & 0xFFFFFFFF
    is_pair = (ids[:, :-1] == ids[:, 1:]) & (tags[:, :-1] < num_candidates) & (tags[:, 1:] >= num_candidates)
    rows, at = np.nonzero(is_pair & (ids[:, 1:] != PAD_ID))
    return rows, tags[rows, at], tags[rows, at + 1] - num_candidates


def _in_order(ids_Rk: Ids, logprobs_Rk: Floats) -> tuple[Ids, Floats]:
    """Rows sorted by log-prob downwards, then by id upwards; rows of NaN stay what they are.

    Both go into one number, whose bits sort as the pair does: many times faster than sorting by two keys.
    """
    # Subtracting makes one zero of both zeros, so that they count as equal.
    bits = (np.float32(0) - logprobs_Rk).view(np.uint32)
    keys = _flipped(bits, bits >> 31 != 0).astype(np.uint64) << np.uint64(32) | ids_Rk.view(np.uint32)
    keys.sort(axis=1)
    high = (keys >> np.uint64(32)).astype(np.uint32)
    bits = _flipped(high, high >> 31 == 0)
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32), np.float32(0) - bits.view(np.float32)


def _flipped(bits: NDArray[np.uint32], flips_all: Mask) -> NDArray[np.uint32]:
    """Bits of floats as integers of the same order, and back: negative ones have all bits flipped, others the sign."""
    return bits ^ np.where(flips_all, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
