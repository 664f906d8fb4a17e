"""Records of `opd.types` to protobuf and back, in pairs; gRPC messages and queue bodies are the same bytes.

Nothing here judges a request beyond its form: whether ids exist or sizes are allowed is the teacher's to say. Bytes
that are no message raise InvalidRequestError, never a protobuf exception.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from opd.errors import InvalidRequestError, from_code
from opd.tracing import checked_traceparent
from opd.types import Capability, Encoding, Floats, Ids, Normalizer, ScoreReply, ScoreRequest, Scores, TeacherInfo
from opd.wire import arrays
from opd.wire.pb import teacher_pb2 as pb
from opd.wire.topk_coding import can_encode_topk, decode_topk, encode_topk

_M = TypeVar("_M", bound=Message)
_T = TypeVar("_T")

_ENCODINGS: dict[int, Encoding] = {
    pb.ENCODING_UNSPECIFIED: Encoding.FLOAT32,
    pb.ENCODING_FLOAT32: Encoding.FLOAT32,
    pb.ENCODING_FLOAT16: Encoding.FLOAT16,
}
_ENCODING_NUMBERS = {Encoding.FLOAT32: pb.ENCODING_FLOAT32, Encoding.FLOAT16: pb.ENCODING_FLOAT16}
_NORMALIZERS: dict[int, Normalizer] = {
    pb.NORMALIZER_UNSPECIFIED: Normalizer.FULL,
    pb.NORMALIZER_FULL: Normalizer.FULL,
}


def encode_request(request: ScoreRequest) -> bytes:
    """The queue body of a request."""
    return request_to_proto(request).SerializeToString()


def decode_request(body: bytes, info: TeacherInfo | None = None) -> ScoreRequest:
    """The request in a queue body; raises InvalidRequestError when it is none."""
    return request_from_proto(_parse(pb.ScoreRequest(), body), info)


def encode_reply(reply: ScoreReply, request: ScoreRequest) -> bytes:
    """The queue body of an answer, in the request's encoding and told by its candidates."""
    return reply_to_proto(reply, request.encoding, request.candidate_token_ids).SerializeToString()


def decode_reply(body: bytes, request: ScoreRequest) -> ScoreReply:
    """The answer to `request` in a queue body; raises the OpdError that travelled when it is a refusal."""
    return reply_from_proto(_parse(pb.ScoreReply(), body), request.candidate_token_ids)


def encode_info(info: TeacherInfo) -> bytes:
    """The handshake as kept in Redis."""
    return info_to_proto(info).SerializeToString()


def decode_info(body: bytes) -> TeacherInfo:
    """The handshake from Redis."""
    return info_from_proto(_parse(pb.GetInfoResponse(), body))


def check_message_size(rollout_id: str, num_bytes: int, max_bytes: int) -> None:
    """Raises InvalidRequestError with both numbers for a message above the limit a teacher publishes; 0 is no limit.

    Both sides ask it before they send, so that nothing is transported only to be refused.
    """
    if max_bytes and num_bytes > max_bytes:
        raise InvalidRequestError(
            f"rollout {rollout_id}: {num_bytes} bytes, a message holds {max_bytes}; send fewer candidates, ask for a "
            "smaller top-k or float16, or raise grpc.max_message_bytes of the teacher"
        )


def content_key(request: ScoreRequest, teacher_fingerprint: str) -> bytes:
    """Hash of content, wants and teacher: equal keys have equal scores. For caching only, never for identity."""
    message = request_to_proto(request)
    for name in ("rollout_id", "content_key", "attempt", "tenant", "timeout_ms", "traceparent"):
        message.ClearField(name)
    message.teacher_fingerprint = teacher_fingerprint
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()


def request_to_proto(request: ScoreRequest) -> pb.ScoreRequest:
    """Inverse of `request_from_proto`."""
    message = pb.ScoreRequest(
        rollout_id=request.rollout_id,
        attempt=request.attempt,
        tenant=request.tenant,
        teacher=request.teacher,
        prompt_token_ids=arrays.encode_ids(request.prompt_token_ids),
        response_token_ids=arrays.encode_ids(request.response_token_ids),
        score_top_k=request.score_top_k,
        teacher_temperature=request.teacher_temperature,
        normalizer=pb.NORMALIZER_FULL,
        encoding=_ENCODING_NUMBERS[request.encoding],
        wants_sampled=request.wants_sampled,
        wants_entropy=request.wants_entropy,
        wants_hidden_states=request.wants_hidden_states,
        batch_invariant=request.batch_invariant,
        timeout_ms=request.timeout_ms,
        teacher_fingerprint=request.teacher_fingerprint,
        traceparent=request.traceparent,
    )
    if request.scored_rows is not None:
        message.scored_rows.CopyFrom(arrays.encode_mask(request.scored_rows))
    if request.candidate_token_ids is not None:
        message.candidate_token_ids.CopyFrom(arrays.encode_ids(request.candidate_token_ids))
    return message


def request_from_proto(message: pb.ScoreRequest, info: TeacherInfo | None = None) -> ScoreRequest:
    """Raises InvalidRequestError naming the field whose form is wrong.

    With the teacher's `info` what is far beyond its limits is refused before it is unpacked: ids of one bit make a long
    array of a short message.
    """
    if info is not None:
        _check_sizes(message, info)
    return ScoreRequest(
        rollout_id=message.rollout_id,
        tenant=message.tenant,
        teacher=message.teacher,
        prompt_token_ids=arrays.decode_ids(message.prompt_token_ids, "prompt_token_ids", 1),
        response_token_ids=arrays.decode_ids(message.response_token_ids, "response_token_ids", 1),
        scored_rows=arrays.decode_mask(message.scored_rows, "scored_rows", 1)
        if message.HasField("scored_rows")
        else None,
        candidate_token_ids=arrays.decode_ids(message.candidate_token_ids, "candidate_token_ids", 2)
        if message.HasField("candidate_token_ids")
        else None,
        score_top_k=message.score_top_k,
        wants_sampled=message.wants_sampled,
        wants_entropy=message.wants_entropy,
        wants_hidden_states=message.wants_hidden_states,
        teacher_temperature=message.teacher_temperature or 1.0,
        normalizer=_lookup(_NORMALIZERS, message.normalizer, "normalizer"),
        encoding=_lookup(_ENCODINGS, message.encoding, "encoding"),
        batch_invariant=message.batch_invariant,
        timeout_ms=message.timeout_ms,
        attempt=message.attempt,
        teacher_fingerprint=message.teacher_fingerprint,
        traceparent=checked_traceparent(message.traceparent),
    )


def _check_sizes(message: pb.ScoreRequest, info: TeacherInfo) -> None:
    """Twice the limits, since what is a little over them is told better by whoever knows the request."""
    num_rows = 2 * info.max_context
    num_response = min(math.prod(message.response_token_ids.shape), num_rows)
    caps = {
        "prompt_token_ids": num_rows,
        "response_token_ids": num_rows,
        "scored_rows": num_rows,
        "candidate_token_ids": 2 * max(num_response, 1) * max(info.max_candidates, 1),
    }
    for name, cap in caps.items():
        num_elements = math.prod(getattr(message, name).shape) if message.HasField(name) else 0
        if num_elements > cap:
            raise InvalidRequestError(
                f"{name}: {num_elements} elements, which is far beyond a context of {info.max_context} tokens and "
                f"{info.max_candidates} candidates a position; send less at once"
            )


def reply_to_proto(
    reply: ScoreReply, encoding: Encoding = Encoding.FLOAT32, candidate_token_ids: Ids | None = None
) -> pb.ScoreReply:
    """Inverse of `reply_from_proto`, up to the rounding of `encoding`.

    With the request's candidate ids, [R, K] for the rows of this reply, the top-k is coded against them.
    """
    scores, message = reply.scores, pb.Scores()
    names = ["sampled_logprobs", "candidate_logprobs", "entropy"]
    if candidate_token_ids is not None and can_encode_topk(scores, candidate_token_ids):
        message.topk_by_candidates.CopyFrom(encode_topk(scores, candidate_token_ids, encoding))
    elif scores.topk_token_ids is not None:
        message.topk_token_ids.CopyFrom(arrays.encode_ids(scores.topk_token_ids))
        names.append("topk_logprobs")
    for name in names:
        values = getattr(scores, name)
        if values is not None:
            getattr(message, name).CopyFrom(arrays.encode_floats(values, encoding))
    if scores.hidden_states is not None:
        message.hidden_states.CopyFrom(arrays.encode_exact(scores.hidden_states))
    return pb.ScoreReply(
        rollout_id=reply.rollout_id,
        teacher_fingerprint=reply.teacher_fingerprint,
        scores=message,
        queue_ms=reply.queue_ms,
        engine_ms=reply.engine_ms,
        replica=reply.replica,
    )


def reply_from_proto(message: pb.ScoreReply, candidate_token_ids: Ids | None = None) -> ScoreReply:
    """Raises the OpdError that travelled when the message is a refusal.

    A reply whose top-k is coded against candidates needs the request's candidate ids, [R, K] for its rows.
    """
    if message.WhichOneof("outcome") == "error":
        error = message.error
        raise from_code(error.code, error.message, error.retry_after_ms / 1000 if error.retry_after_ms else None)
    scores = message.scores
    candidate_logprobs = _optional_floats(scores, "candidate_logprobs", 2)
    topk_token_ids, topk_logprobs = _topk(scores, candidate_token_ids, candidate_logprobs)
    return ScoreReply(
        rollout_id=message.rollout_id,
        teacher_fingerprint=message.teacher_fingerprint,
        scores=Scores(
            sampled_logprobs=_optional_floats(scores, "sampled_logprobs", 1),
            candidate_logprobs=candidate_logprobs,
            topk_token_ids=topk_token_ids,
            topk_logprobs=topk_logprobs,
            entropy=_optional_floats(scores, "entropy", 1),
            hidden_states=arrays.decode_exact(scores.hidden_states, "hidden_states", 2)
            if scores.HasField("hidden_states")
            else None,
        ),
        queue_ms=message.queue_ms,
        engine_ms=message.engine_ms,
        replica=message.replica,
    )


def info_to_proto(info: TeacherInfo) -> pb.GetInfoResponse:
    """Inverse of `info_from_proto`."""
    return pb.GetInfoResponse(
        teacher=info.teacher,
        fingerprint=info.fingerprint,
        model=info.model,
        engine=info.engine,
        vocab_rows=info.vocab_rows,
        num_defined_ids=info.num_defined_ids,
        id_map_hash=info.id_map_hash,
        special_tokens=info.special_tokens,
        eos_token_ids=info.eos_token_ids,
        chat_template_hash=info.chat_template_hash,
        dtype=info.dtype,
        max_context=info.max_context,
        max_candidates=info.max_candidates,
        max_score_top_k=info.max_score_top_k,
        max_batch_tokens=info.max_batch_tokens,
        max_message_bytes=info.max_message_bytes,
        capabilities=sorted(info.capabilities),
        version=info.version,
        hidden_size=info.hidden_size,
        output_head_hash=info.output_head_hash,
        logit_scale=info.logit_scale,
        logit_softcap=info.logit_softcap or 0.0,
    )


def info_from_proto(message: pb.GetInfoResponse) -> TeacherInfo:
    """Capabilities this version does not know are left out: they cannot be asked for."""
    known = {capability.value for capability in Capability}
    return TeacherInfo(
        teacher=message.teacher,
        fingerprint=message.fingerprint,
        model=message.model,
        engine=message.engine,
        vocab_rows=message.vocab_rows,
        num_defined_ids=message.num_defined_ids,
        id_map_hash=message.id_map_hash,
        special_tokens=dict(message.special_tokens),
        eos_token_ids=tuple(message.eos_token_ids),
        chat_template_hash=message.chat_template_hash,
        dtype=message.dtype,
        max_context=message.max_context,
        max_candidates=message.max_candidates,
        max_score_top_k=message.max_score_top_k,
        max_batch_tokens=message.max_batch_tokens,
        max_message_bytes=message.max_message_bytes,
        capabilities=frozenset(Capability(name) for name in message.capabilities if name in known),
        version=message.version,
        hidden_size=message.hidden_size,
        output_head_hash=message.output_head_hash,
        logit_scale=message.logit_scale or 1.0,
        logit_softcap=message.logit_softcap or None,
    )


def _optional_floats(scores: pb.Scores, name: str, num_dims: int) -> Floats | None:
    return arrays.decode_floats(getattr(scores, name), name, num_dims) if name in _present(scores) else None


def _topk(
    scores: pb.Scores, candidate_ids: Ids | None, candidate_logprobs: Floats | None
) -> tuple[Ids | None, Floats | None]:
    if not scores.HasField("topk_by_candidates"):
        has_ids = scores.HasField("topk_token_ids")
        ids = arrays.decode_ids(scores.topk_token_ids, "topk_token_ids", 2) if has_ids else None
        return ids, _optional_floats(scores, "topk_logprobs", 2)
    if candidate_ids is None:
        raise InvalidRequestError("topk_by_candidates: the request had no candidates; send topk_token_ids plainly")
    return decode_topk(scores.topk_by_candidates, candidate_ids, candidate_logprobs)


def _present(message: Message) -> set[str]:
    return {descriptor.name for descriptor, _ in message.ListFields()}


def _parse(message: _M, body: bytes) -> _M:
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise InvalidRequestError(
            f"body: {len(body)} bytes are no {type(message).__name__} of opd.v1; encode it with opd.wire"
        ) from error
    return message


def _lookup(table: Mapping[int, _T], number: int, name: str) -> _T:
    if number not in table:
        raise InvalidRequestError(f"{name}: {number} is not known to this version; known are {sorted(table)}")
    return table[number]
