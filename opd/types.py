"""The data contract: every record that travels between the parts of the system, on one screen.

Shapes: P prompt tokens, R response tokens, K candidate ids per position, k teacher top-k. Arrays are NumPy, token ids
int32, log-probs float32 and natural; index i is the log-prob of response token i given everything before it. A value
that was not computed is NaN, never 0.0 (which would mean probability 1). Records are checked where they enter the
system (a request by the teacher that is to score it), not here, so that building one is free.
"""

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int32]
Floats: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]

PAD_ID = -1
"""Fills unused places of a candidate matrix; its log-prob is answered as NaN."""


class Encoding(StrEnum):
    """How log-probs are stored on the wire. They are always computed in fp32 first."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


class Normalizer(StrEnum):
    """Over what the teacher normalises. Only the full vocabulary is exact; the field is reserved for later modes."""

    FULL = "full"


class FinishReason(StrEnum):
    """Why a response ended: an EOS was sampled (and counts as a position), or the length limit was met."""

    STOP = "stop"
    LENGTH = "length"


class Capability(StrEnum):
    """What an engine supplies exactly. A request that needs an absent one is refused, never approximated."""

    SAMPLED_LOGPROBS = "sampled_logprobs"
    CANDIDATE_LOGPROBS = "candidate_logprobs"
    TEACHER_TOP_K = "teacher_top_k"
    ENTROPY = "entropy"
    TEACHER_TEMPERATURE = "teacher_temperature"
    BATCH_INVARIANT = "batch_invariant"
    HIDDEN_STATES = "hidden_states"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRequest:
    """One rollout to be scored by a teacher.

    Example: a 3-token prompt and a 2-token response, the teacher's log-probs wanted at two student ids per position::

        ScoreRequest(rollout_id="run7.0.0", tenant="math", teacher="qwen",
                     prompt_token_ids=np.array([5, 9, 2], np.int32), response_token_ids=np.array([7, 1], np.int32),
                     candidate_token_ids=np.array([[7, 3], [1, 8]], np.int32), score_top_k=2, wants_entropy=True)
    """

    rollout_id: str
    """`run.step.index`: unique, the identity of delivery. See `rollout_id()`."""
    tenant: str
    """Who asks; [a-z0-9-]{1,63}."""
    teacher: str
    """The pool's name; [a-z0-9-]{1,63}."""
    prompt_token_ids: Ids
    """[P] as the *teacher* is to see them; P >= 1."""
    response_token_ids: Ids
    """[R] as the student sampled them; R >= 1."""
    scored_rows: Mask | None = None
    """[R] which response positions to score; None means all. Unscored rows are answered as NaN (top-k ids -1)."""
    candidate_token_ids: Ids | None = None
    """[R, K] ids whose log-probs are wanted at each position, padded with `PAD_ID`."""
    score_top_k: int = 0
    """k of the teacher's own top-k; 0 means not wanted."""
    wants_sampled: bool = True
    wants_entropy: bool = False
    wants_hidden_states: bool = False
    """Over gRPC only, and only where the tenant has the right; see docs/hidden-states.md."""
    teacher_temperature: float = 1.0
    """Divides the teacher's logits before the normaliser."""
    normalizer: Normalizer = Normalizer.FULL
    encoding: Encoding = Encoding.FLOAT32
    batch_invariant: bool = False
    """Scored alone with fixed shapes, so that a repeat is bit-equal."""
    timeout_ms: int = 300_000
    """Counted from the moment the request was admitted."""
    attempt: int = 0
    """How often the client has submitted this rollout before."""
    teacher_fingerprint: str = ""
    """When set, only a replica with this fingerprint may answer."""
    traceparent: str = ""
    """W3C trace context of the span that asks (see `opd.tracing`); empty where nothing is traced. No part of what is
    asked."""

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens: the unit of every budget, cap and deficit."""
        return int(self.prompt_token_ids.size + self.response_token_ids.size)

    @property
    def prompt_hash(self) -> str:
        """Eight hex digits by which schedulers find rollouts of one prompt; too few to prove that two are equal."""
        return hashlib.blake2b(self.prompt_token_ids.astype("<i4").tobytes(), digest_size=4).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What a teacher says of the R response positions; a field that was not asked for is None."""

    sampled_logprobs: Floats | None = None
    """[R]"""
    candidate_logprobs: Floats | None = None
    """[R, K]; NaN where the candidate id was `PAD_ID`."""
    topk_token_ids: Ids | None = None
    """[R, k] the teacher's k most likely ids, most likely first, ties to the lower id; the set is exact, and ids whose
    log-probs float16 made equal count as ties."""
    topk_logprobs: Floats | None = None
    """[R, k]"""
    entropy: Floats | None = None
    """[R] in nats, over the full vocabulary at the teacher temperature."""
    hidden_states: Floats | None = None
    """[R, H] after the final norm, exactly as the teacher's own head is given them: float32 holds every bf16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreReply:
    """A teacher's answer to one request."""

    rollout_id: str
    teacher_fingerprint: str
    scores: Scores
    queue_ms: float = 0.0
    """From admission to the start of the forward pass."""
    engine_ms: float = 0.0
    """The forward pass of the batch this request was in."""
    replica: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherInfo:
    """The handshake: what a teacher is, what it can do exactly, and how much it takes at once."""

    teacher: str
    fingerprint: str
    """Hash of weights, vocabulary and dtype: equal fingerprints give equal scores (to rounding)."""
    model: str
    """For people: a path's last part or a hub name."""
    engine: str
    vocab_rows: int
    """Rows of the output head, padding rows included."""
    num_defined_ids: int
    """Ids that stand for a token; rows at and above are masked out of every normaliser."""
    id_map_hash: str
    """Hash of the id -> token map over the defined ids."""
    special_tokens: dict[str, int] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    chat_template_hash: str = ""
    dtype: str = "float32"
    max_context: int = 0
    """Prompt plus response tokens of one request."""
    max_candidates: int = 0
    max_score_top_k: int = 0
    max_batch_tokens: int = 0
    max_message_bytes: int = 0
    capabilities: frozenset[Capability] = frozenset()
    version: str = ""
    hidden_size: int = 0
    """H; 0 where hidden states are not served, and then the next three say nothing."""
    output_head_hash: str = ""
    """sha256 over the head's bytes, the weight and then the bias."""
    logit_scale: float = 1.0
    """Multiplies h W^T + b, before the soft-cap and before any temperature."""
    logit_softcap: float | None = None
    """c of c * tanh(logit / c)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedHead:
    """An output head as bytes, row-major and little-endian, in the dtype the model stores."""

    weight: memoryview
    """Of V * H elements."""
    bias: bytes
    """Of V elements; empty when the head has none."""
    shape: tuple[int, int]
    """(V, H)"""
    dtype: str
    """float32, bfloat16 or float16."""
    sha256: str
    """In hex, over weight and then bias."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputHeadFile:
    """A teacher's output head on this machine's disk, whole and verified.

    Example: the head of a bf16 teacher of 151,936 rows and hidden size 2,048 is one safetensors file of 622 MB with
    the tensor `weight` [V, H] and, where the head has one, `bias` [V], both in the teacher's stored dtype.
    """

    path: Path
    sha256: str
    num_defined_ids: int
    """Rows at and above it stand for no token."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One prompt, one response sampled from the student, and what the sampler saw while sampling.

    The top-k ids are the student's support at rollout time; a loss uses exactly these.
    """

    rollout_id: str
    group: int
    """Rollouts of one prompt share it (index into the step's prompts)."""
    prompt_token_ids: Ids
    """[P] as the student saw them."""
    response_token_ids: Ids
    """[R], a sampled EOS included."""
    finish_reason: FinishReason
    rollout_logprobs: Floats
    """[R] of the sampled tokens under the sampler actually used (temperature and top-p applied)."""
    topk_token_ids: Ids
    """[R, k] the student's support, most likely first, ties to the lower id, ranked in fp32."""
    topk_logprobs: Floats
    """[R, k] at the sampling temperature, over the full vocabulary (before top-p)."""
    sampled_logprobs: Floats
    """[R] of the sampled tokens at the sampling temperature, over the full vocabulary (before top-p)."""
    entropy: Floats
    """[R] nats, at the sampling temperature, over the full vocabulary."""
    policy_version: int
    """The student's weight version that sampled it."""


def rollout_id(run: str, step: int, index: int) -> str:
    """The identity of delivery: unique over runs, steps and rollouts of a step."""
    return f"{run}.{step}.{index}"


def policy_version_of(rollout_id: str) -> int | None:
    """The step whose weights sampled a rollout, as its id has it; None for an id of another form."""
    step = rollout_id.rsplit(".", 2)[1:2]
    return int(step[0]) if step and step[0].isdecimal() and step[0].isascii() else None
