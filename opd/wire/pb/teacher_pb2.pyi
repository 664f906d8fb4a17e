from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_INT32: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_BOOL: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_PACKED_IDS: _ClassVar[DType]
    DTYPE_BITS: _ClassVar[DType]

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_FLOAT32: _ClassVar[Encoding]
    ENCODING_FLOAT16: _ClassVar[Encoding]

class Normalizer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NORMALIZER_UNSPECIFIED: _ClassVar[Normalizer]
    NORMALIZER_FULL: _ClassVar[Normalizer]
DTYPE_UNSPECIFIED: DType
DTYPE_INT32: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT16: DType
DTYPE_BOOL: DType
DTYPE_BFLOAT16: DType
DTYPE_PACKED_IDS: DType
DTYPE_BITS: DType
ENCODING_UNSPECIFIED: Encoding
ENCODING_FLOAT32: Encoding
ENCODING_FLOAT16: Encoding
NORMALIZER_UNSPECIFIED: Normalizer
NORMALIZER_FULL: Normalizer

class Array(_message.Message):
    __slots__ = ("dtype", "shape", "data", "bit_width")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    BIT_WIDTH_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    bit_width: int
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., bit_width: _Optional[int] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("rollout_id", "content_key", "attempt", "tenant", "teacher", "prompt_token_ids", "response_token_ids", "scored_rows", "candidate_token_ids", "score_top_k", "teacher_temperature", "normalizer", "encoding", "wants_sampled", "wants_entropy", "wants_hidden_states", "batch_invariant", "timeout_ms", "teacher_fingerprint", "traceparent")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    CONTENT_KEY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORED_ROWS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORE_TOP_K_FIELD_NUMBER: _ClassVar[int]
    TEACHER_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    NORMALIZER_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    WANTS_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    WANTS_ENTROPY_FIELD_NUMBER: _ClassVar[int]
    WANTS_HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    BATCH_INVARIANT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    content_key: bytes
    attempt: int
    tenant: str
    teacher: str
    prompt_token_ids: Array
    response_token_ids: Array
    scored_rows: Array
    candidate_token_ids: Array
    score_top_k: int
    teacher_temperature: float
    normalizer: Normalizer
    encoding: Encoding
    wants_sampled: bool
    wants_entropy: bool
    wants_hidden_states: bool
    batch_invariant: bool
    timeout_ms: int
    teacher_fingerprint: str
    traceparent: str
    def __init__(self, rollout_id: _Optional[str] = ..., content_key: _Optional[bytes] = ..., attempt: _Optional[int] = ..., tenant: _Optional[str] = ..., teacher: _Optional[str] = ..., prompt_token_ids: _Optional[_Union[Array, _Mapping]] = ..., response_token_ids: _Optional[_Union[Array, _Mapping]] = ..., scored_rows: _Optional[_Union[Array, _Mapping]] = ..., candidate_token_ids: _Optional[_Union[Array, _Mapping]] = ..., score_top_k: _Optional[int] = ..., teacher_temperature: _Optional[float] = ..., normalizer: _Optional[_Union[Normalizer, str]] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., wants_sampled: bool = ..., wants_entropy: bool = ..., wants_hidden_states: bool = ..., batch_invariant: bool = ..., timeout_ms: _Optional[int] = ..., teacher_fingerprint: _Optional[str] = ..., traceparent: _Optional[str] = ...) -> None: ...

class Scores(_message.Message):
    __slots__ = ("sampled_logprobs", "candidate_logprobs", "topk_token_ids", "topk_logprobs", "entropy", "hidden_states", "topk_by_candidates")
    SAMPLED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOPK_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOPK_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    TOPK_BY_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    sampled_logprobs: Array
    candidate_logprobs: Array
    topk_token_ids: Array
    topk_logprobs: Array
    entropy: Array
    hidden_states: Array
    topk_by_candidates: TopkByCandidates
    def __init__(self, sampled_logprobs: _Optional[_Union[Array, _Mapping]] = ..., candidate_logprobs: _Optional[_Union[Array, _Mapping]] = ..., topk_token_ids: _Optional[_Union[Array, _Mapping]] = ..., topk_logprobs: _Optional[_Union[Array, _Mapping]] = ..., entropy: _Optional[_Union[Array, _Mapping]] = ..., hidden_states: _Optional[_Union[Array, _Mapping]] = ..., topk_by_candidates: _Optional[_Union[TopkByCandidates, _Mapping]] = ...) -> None: ...

class TopkByCandidates(_message.Message):
    __slots__ = ("k", "members", "other_token_ids", "other_logprobs", "rows")
    K_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    OTHER_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OTHER_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    k: int
    members: Array
    other_token_ids: Array
    other_logprobs: Array
    rows: Array
    def __init__(self, k: _Optional[int] = ..., members: _Optional[_Union[Array, _Mapping]] = ..., other_token_ids: _Optional[_Union[Array, _Mapping]] = ..., other_logprobs: _Optional[_Union[Array, _Mapping]] = ..., rows: _Optional[_Union[Array, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "retryable", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    retryable: bool
    retry_after_ms: int
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., retryable: bool = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class ScoreReply(_message.Message):
    __slots__ = ("rollout_id", "teacher_fingerprint", "scores", "error", "queue_ms", "engine_ms", "replica")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_MS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    teacher_fingerprint: str
    scores: Scores
    error: Error
    queue_ms: float
    engine_ms: float
    replica: str
    def __init__(self, rollout_id: _Optional[str] = ..., teacher_fingerprint: _Optional[str] = ..., scores: _Optional[_Union[Scores, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., queue_ms: _Optional[float] = ..., engine_ms: _Optional[float] = ..., replica: _Optional[str] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("reply",)
    REPLY_FIELD_NUMBER: _ClassVar[int]
    reply: ScoreReply
    def __init__(self, reply: _Optional[_Union[ScoreReply, _Mapping]] = ...) -> None: ...

class ScoreStreamRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: ScoreRequest
    def __init__(self, request: _Optional[_Union[ScoreRequest, _Mapping]] = ...) -> None: ...

class ScoreStreamResponse(_message.Message):
    __slots__ = ("first_row", "reply", "is_last")
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    first_row: int
    reply: ScoreReply
    is_last: bool
    def __init__(self, first_row: _Optional[int] = ..., reply: _Optional[_Union[ScoreReply, _Mapping]] = ..., is_last: bool = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ("teacher",)
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    def __init__(self, teacher: _Optional[str] = ...) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("teacher", "fingerprint", "model", "engine", "vocab_rows", "num_defined_ids", "id_map_hash", "special_tokens", "eos_token_ids", "chat_template_hash", "dtype", "max_context", "max_candidates", "max_score_top_k", "max_batch_tokens", "max_message_bytes", "capabilities", "version", "hidden_size", "output_head_hash", "logit_scale", "logit_softcap")
    class SpecialTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_DEFINED_IDS_FIELD_NUMBER: _ClassVar[int]
    ID_MAP_HASH_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_HASH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    MAX_SCORE_TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_HEAD_HASH_FIELD_NUMBER: _ClassVar[int]
    LOGIT_SCALE_FIELD_NUMBER: _ClassVar[int]
    LOGIT_SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    fingerprint: str
    model: str
    engine: str
    vocab_rows: int
    num_defined_ids: int
    id_map_hash: str
    special_tokens: _containers.ScalarMap[str, int]
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    chat_template_hash: str
    dtype: str
    max_context: int
    max_candidates: int
    max_score_top_k: int
    max_batch_tokens: int
    max_message_bytes: int
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    version: str
    hidden_size: int
    output_head_hash: str
    logit_scale: float
    logit_softcap: float
    def __init__(self, teacher: _Optional[str] = ..., fingerprint: _Optional[str] = ..., model: _Optional[str] = ..., engine: _Optional[str] = ..., vocab_rows: _Optional[int] = ..., num_defined_ids: _Optional[int] = ..., id_map_hash: _Optional[str] = ..., special_tokens: _Optional[_Mapping[str, int]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., chat_template_hash: _Optional[str] = ..., dtype: _Optional[str] = ..., max_context: _Optional[int] = ..., max_candidates: _Optional[int] = ..., max_score_top_k: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ..., hidden_size: _Optional[int] = ..., output_head_hash: _Optional[str] = ..., logit_scale: _Optional[float] = ..., logit_softcap: _Optional[float] = ...) -> None: ...

class GetOutputHeadRequest(_message.Message):
    __slots__ = ("teacher", "offset_bytes")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    offset_bytes: int
    def __init__(self, teacher: _Optional[str] = ..., offset_bytes: _Optional[int] = ...) -> None: ...

class GetOutputHeadResponse(_message.Message):
    __slots__ = ("sha256", "shape", "dtype", "offset_bytes", "data", "bias")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: DType
    offset_bytes: int
    data: bytes
    bias: bytes
    def __init__(self, sha256: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[DType, str]] = ..., offset_bytes: _Optional[int] = ..., data: _Optional[bytes] = ..., bias: _Optional[bytes] = ...) -> None: ...
