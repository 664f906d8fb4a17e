"""What a request must be before it may take anybody's time: every refusal names field, value and limit.

Checks are cheap and come before admission, so that a bad request never holds tokens or reaches the engine.
"""

import math
import re
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from opd.errors import InvalidRequestError, OpdError, UnknownTeacherError, UnsupportedError
from opd.types import PAD_ID, Capability, Encoding, ScoreRequest, TeacherInfo

MAX_TIMEOUT_MS = 24 * 3_600_000
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
_NAME = re.compile(r"[a-z0-9-]{1,63}")
_MAX_ROLLOUT_ID = 200
# Field headers, names and times of a reply; generous.
_REPLY_OVERHEAD_BYTES = 1024


def check_request(request: ScoreRequest, info: TeacherInfo, *, is_streamed: bool = False) -> None:
    """Raises InvalidRequestError, UnknownTeacherError or UnsupportedError; `is_streamed` answers leave in chunks."""
    _check_identity(request, info)
    _check_tokens(request, info)
    _check_candidates(request, info)
    _check_settings(request, info)
    _check_capabilities(request, info)
    if is_streamed:
        _check_row_size(request, info)
    else:
        _check_one_message(request)
        _check_reply_size(request, info)


def _check_identity(request: ScoreRequest, info: TeacherInfo) -> None:
    rollout_id = request.rollout_id
    if not 1 <= len(rollout_id) <= _MAX_ROLLOUT_ID or not rollout_id.isprintable() or " " in rollout_id:
        raise _invalid(
            "rollout_id", repr(rollout_id[:_MAX_ROLLOUT_ID]), f"give 1 to {_MAX_ROLLOUT_ID} printable characters"
        )
    if not _NAME.fullmatch(request.tenant):
        raise _invalid("tenant", repr(request.tenant[:80]), "names are [a-z0-9-]{1,63}")
    if request.teacher not in (info.teacher, f"{info.teacher}@{info.fingerprint}"):
        raise UnknownTeacherError(
            f"teacher={request.teacher[:80]!r}: this replica serves {info.teacher!r}; ask its own pool"
        )
    if request.teacher_fingerprint and request.teacher_fingerprint != info.fingerprint:
        raise UnknownTeacherError(
            f"teacher_fingerprint={request.teacher_fingerprint[:80]!r}: this replica serves "
            f"{info.teacher}@{info.fingerprint}; pin that one or leave it empty"
        )


def _check_tokens(request: ScoreRequest, info: TeacherInfo) -> None:
    for name in ("prompt_token_ids", "response_token_ids"):
        ids: NDArray[np.int32] = getattr(request, name)
        if ids.ndim != 1 or ids.size == 0:
            raise _invalid(name, f"shape {ids.shape}", "at least one token is needed")
        _check_range(name, ids, info.num_defined_ids)
    if request.num_tokens > info.max_context:
        raise _invalid(
            "prompt_token_ids and response_token_ids",
            f"{request.num_tokens} tokens",
            f"the context holds {info.max_context}; shorten the rollout",
        )
    mask, num_response = request.scored_rows, request.response_token_ids.size
    if mask is not None and mask.shape != (num_response,):
        raise _invalid("scored_rows", f"shape {mask.shape}", f"the response has {num_response} tokens")


def _check_candidates(request: ScoreRequest, info: TeacherInfo) -> None:
    candidates, num_response = request.candidate_token_ids, request.response_token_ids.size
    if candidates is None:
        return
    if candidates.ndim != 2 or candidates.shape[0] != num_response or candidates.shape[1] == 0:
        raise _invalid("candidate_token_ids", f"shape {candidates.shape}", f"expected ({num_response}, K) with K >= 1")
    if candidates.shape[1] > info.max_candidates:
        raise _invalid("candidate_token_ids", f"K={candidates.shape[1]}", f"at most {info.max_candidates} a position")
    _check_range("candidate_token_ids", candidates, info.num_defined_ids, can_pad=True)


def _check_settings(request: ScoreRequest, info: TeacherInfo) -> None:
    if not 0 <= request.score_top_k <= info.max_score_top_k:
        raise _invalid("score_top_k", str(request.score_top_k), f"give 0 to {info.max_score_top_k}")
    temperature = request.teacher_temperature
    if not math.isfinite(temperature) or not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise _invalid("teacher_temperature", str(temperature), f"give {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}")
    if not 1 <= request.timeout_ms <= MAX_TIMEOUT_MS:
        raise _invalid("timeout_ms", str(request.timeout_ms), f"give 1 to {MAX_TIMEOUT_MS}")
    wants = (request.wants_sampled, request.wants_entropy, request.score_top_k, request.wants_hidden_states)
    if not any(wants) and request.candidate_token_ids is None:
        raise _invalid("wants_sampled", "False", "nothing is asked for; want sampled, entropy, candidates or top-k")


def _check_capabilities(request: ScoreRequest, info: TeacherInfo) -> None:
    needs = {
        Capability.SAMPLED_LOGPROBS: request.wants_sampled,
        Capability.CANDIDATE_LOGPROBS: request.candidate_token_ids is not None,
        Capability.TEACHER_TOP_K: request.score_top_k > 0,
        Capability.ENTROPY: request.wants_entropy,
        Capability.TEACHER_TEMPERATURE: request.teacher_temperature != 1.0,
        Capability.BATCH_INVARIANT: request.batch_invariant,
        Capability.HIDDEN_STATES: request.wants_hidden_states,
    }
    absent = [
        capability for capability, is_needed in needs.items() if is_needed and capability not in info.capabilities
    ]
    if absent:
        raise UnsupportedError(
            f"{absent[0]}: the {info.engine} engine of {info.teacher} does not supply it exactly; it supplies "
            f"{', '.join(sorted(info.capabilities))}"
        )


def _check_row_size(request: ScoreRequest, info: TeacherInfo) -> None:
    """What is streamed may be long; only a single row has to fit in a message."""
    first = replace(request, response_token_ids=request.response_token_ids[:1])
    num_bytes = reply_bytes(first, info.num_defined_ids)
    num_bytes += 4 * info.hidden_size * request.wants_hidden_states
    if num_bytes > info.max_message_bytes:
        raise _invalid(
            "response_token_ids",
            f"rows of about {num_bytes} bytes",
            f"a message holds {info.max_message_bytes}; ask for fewer candidates or a smaller top-k",
        )


def _check_one_message(request: ScoreRequest) -> None:
    if request.wants_hidden_states:
        raise UnsupportedError(
            "wants_hidden_states=true: hidden states travel in ScoreStream over gRPC alone, never through the queue or "
            "in one message; ask a grpc:// address with wants_hidden_states"
        )


def _check_reply_size(request: ScoreRequest, info: TeacherInfo) -> None:
    num_bytes = reply_bytes(request, info.num_defined_ids)
    if num_bytes > info.max_message_bytes:
        raise _invalid(
            "response_token_ids",
            f"an answer of about {num_bytes} bytes",
            f"a message holds {info.max_message_bytes}; ask for fewer candidates, a smaller top-k or float16",
        )


def reply_bytes(request: ScoreRequest, num_defined_ids: int) -> int:
    """Upper bound of the encoded answer's size, however much of the top-k the candidates say already."""
    candidates = request.candidate_token_ids
    num_candidates = 0 if candidates is None else candidates.shape[1]
    num_floats = request.wants_sampled + request.wants_entropy + num_candidates + request.score_top_k
    float_bytes = 2 if request.encoding is Encoding.FLOAT16 else 4
    # Packed ids, and one bit that says whether a candidate is in the top-k.
    id_bits = request.score_top_k * num_defined_ids.bit_length() + num_candidates
    row_bits = 8 * num_floats * float_bytes + id_bits
    return int(request.response_token_ids.size) * row_bits // 8 + _REPLY_OVERHEAD_BYTES


def _check_range(name: str, ids: NDArray[np.int32], num_defined_ids: int, *, can_pad: bool = False) -> None:
    bad = (ids < 0) | (ids >= num_defined_ids)
    if can_pad:
        bad &= ids != PAD_ID
    if bad.any():
        place = tuple(int(index) for index in np.argwhere(bad)[0])
        where = ", ".join(str(index) for index in place)
        padding = f" or {PAD_ID} for padding" if can_pad else ""
        raise _invalid(f"{name}[{where}]", str(int(ids[place])), f"ids are 0 to {num_defined_ids - 1}{padding}")


def _invalid(field: str, value: str, way_out: str) -> OpdError:
    return InvalidRequestError(f"{field}={value}: {way_out}")
