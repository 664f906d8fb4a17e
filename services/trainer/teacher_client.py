"""The trainer's side of the scoring contract: the handshake, what is asked of each rollout, what is accepted as answer.

Transport, retries and re-submission belong to the score client below; nothing is tried again here. One fingerprint is
pinned per step, so that every score of a step comes from the same weights also while a pool is being upgraded.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from opd.errors import InternalError, NonFiniteError, TeacherUnavailableError, UnsupportedError
from opd.types import Capability, Encoding, Ids, Rollout, ScoreReply, ScoreRequest, Scores, TeacherInfo
from opd.vocabulary import Vocabulary, check_same_vocabulary

_log = logging.getLogger(__name__)
_POLL_S = 1.0
_MESSAGE_EVERY_S = 15.0


class ScoreClient(Protocol):
    """What carries requests: `opd.client.SyncScoreClient`, over the queue or gRPC."""

    def submit(self, request: ScoreRequest) -> Future[ScoreReply]:
        """Returns at once; the future ends with the reply or an `OpdError`."""
        ...

    def info(self) -> TeacherInfo:
        """The pool's handshake; a retryable error while no replica has ever said who it is."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreWants:
    """What the trainer asks of a teacher: the same for every rollout of a run."""

    tenant: str
    teacher: str
    """The pool's name."""
    score_top_k: int
    teacher_temperature: float = 1.0
    encoding: Encoding = Encoding.FLOAT32
    batch_invariant: bool = False
    wants_hidden_states: bool = False
    """For an objective over the whole vocabulary; over gRPC only."""
    timeout_ms: int = 300_000
    max_context: int = 0
    """Longest prompt plus response the run can produce."""


class TeacherClient:
    """Sends rollouts to one pool and checks what comes back."""

    def __init__(self, client: ScoreClient, wants: ScoreWants, *, vocabulary: Vocabulary, student_name: str) -> None:
        self._client = client
        self._wants = wants
        self._vocabulary = vocabulary
        self._student_name = student_name
        self._info: TeacherInfo | None = None

    @property
    def info(self) -> TeacherInfo:
        """The teacher pinned at the moment."""
        if self._info is None:
            raise InternalError("the teacher was asked before the handshake")
        return self._info

    def shake_hands(self, *, wait_s: float, on_wait: Callable[[str], None] = _log.info) -> TeacherInfo:
        """Waits for the pool's info and accepts it, telling `on_wait` while there is none.

        Raises `TeacherUnavailableError` after `wait_s`, and what `_accept` refuses at once.
        """
        deadline = time.monotonic() + wait_s
        next_message = time.monotonic()
        while True:
            try:
                return self._accept(self._client.info())
            except TeacherUnavailableError as error:
                now = time.monotonic()
                if now >= deadline:
                    raise TeacherUnavailableError(
                        f"teacher pool {self._wants.teacher}: no replica within {wait_s:.0f} s ({error.message}); "
                        "start one with `opd teacher serve` or raise teacher.wait_s"
                    ) from error
                if now >= next_message:
                    on_wait(f"waiting for a replica of teacher pool {self._wants.teacher} ({error.message})")
                    next_message = now + _MESSAGE_EVERY_S
                time.sleep(min(_POLL_S, max(0.0, deadline - now)))

    def pin(self) -> str:
        """Called once a step: asks who serves now, accepts a new fingerprint, returns the pinned one."""
        try:
            current = self._client.info()
        except TeacherUnavailableError as error:
            # Requests wait in the queue while nobody serves, so the step may begin with the teacher known so far.
            _log.warning("teacher info is not to be had (%s), keeping %s", error.message, self.info.fingerprint)
            return self.info.fingerprint
        if current.fingerprint != self.info.fingerprint:
            _log.warning("teacher changed from %s to %s", self.info.fingerprint, current.fingerprint)
            self._accept(current)
        return self.info.fingerprint

    def send(self, rollout: Rollout, teacher_prompt_token_ids: Ids) -> Future[ScoreReply]:
        """Asks for the teacher's log-probs at the rollout's sampled and support ids, its own top-k and entropy."""
        wants = self._wants
        return self._client.submit(
            ScoreRequest(
                rollout_id=rollout.rollout_id,
                tenant=wants.tenant,
                teacher=wants.teacher,
                prompt_token_ids=teacher_prompt_token_ids,
                response_token_ids=rollout.response_token_ids,
                candidate_token_ids=rollout.topk_token_ids,
                score_top_k=wants.score_top_k,
                wants_entropy=Capability.ENTROPY in self.info.capabilities,
                wants_hidden_states=wants.wants_hidden_states,
                teacher_temperature=wants.teacher_temperature,
                encoding=wants.encoding,
                batch_invariant=wants.batch_invariant,
                timeout_ms=wants.timeout_ms,
                teacher_fingerprint=self.info.fingerprint,
            )
        )

    def accept(self, rollout: Rollout, reply: ScoreReply) -> Scores:
        """The scores of a reply that fits; `InternalError` for another shape, `NonFiniteError` for NaN or infinity."""
        if reply.teacher_fingerprint != self.info.fingerprint:
            raise InternalError(
                f"rollout {rollout.rollout_id}: scored by teacher {reply.teacher_fingerprint} and not by the pinned "
                f"{self.info.fingerprint}"
            )
        num_positions, num_candidates = rollout.topk_token_ids.shape
        scores = reply.scores
        columns = {
            "sampled_logprobs": (scores.sampled_logprobs, (num_positions,)),
            "candidate_logprobs": (scores.candidate_logprobs, (num_positions, num_candidates)),
            "topk_logprobs": (scores.topk_logprobs, (num_positions, self._wants.score_top_k)),
        }
        if self._wants.wants_hidden_states:
            columns["hidden_states"] = (scores.hidden_states, (num_positions, self.info.hidden_size))
        for name, (values, shape) in columns.items():
            if values is None or values.shape != shape:
                found = "nothing" if values is None else str(values.shape)
                raise InternalError(f"rollout {rollout.rollout_id}: teacher {name} are {found} instead of {shape}")
            if not np.isfinite(values).all():
                raise NonFiniteError(f"rollout {rollout.rollout_id}: teacher {name} are not finite")
        return scores

    def _accept(self, info: TeacherInfo) -> TeacherInfo:
        """Refuses another id map, missing capabilities and limits below what the run asks for."""
        for warning in check_same_vocabulary(self._vocabulary, self._student_name, info):
            _log.warning("%s", warning)
        if info.teacher != self._wants.teacher.partition("@")[0]:
            raise UnsupportedError(
                f"teacher {self._wants.teacher}: the replica there serves {info.teacher}; set teacher.pool to that"
            )
        self._check_capabilities(info)
        self._check_limits(info)
        self._info = info
        return info

    def _check_capabilities(self, info: TeacherInfo) -> None:
        needed = {Capability.SAMPLED_LOGPROBS, Capability.CANDIDATE_LOGPROBS, Capability.TEACHER_TOP_K}
        if self._wants.teacher_temperature != 1.0:
            needed.add(Capability.TEACHER_TEMPERATURE)
        if self._wants.batch_invariant:
            needed.add(Capability.BATCH_INVARIANT)
        if self._wants.wants_hidden_states:
            needed.add(Capability.HIDDEN_STATES)
        missing = sorted(needed - info.capabilities)
        if missing:
            raise UnsupportedError(
                f"teacher {info.teacher} ({info.engine}) cannot supply {', '.join(missing)}; use a teacher that does "
                "(engine=transformers; for hidden states hidden_states.enabled=true)"
            )

    def _check_limits(self, info: TeacherInfo) -> None:
        limits = (
            ("objective.score_top_k", self._wants.score_top_k, info.max_score_top_k),
            ("objective.score_top_k", self._wants.score_top_k, info.max_candidates),
            ("rollout.max_prompt_tokens + max_response_tokens", self._wants.max_context, info.max_context),
        )
        for name, wanted, limit in limits:
            # 0 means that the teacher states no limit.
            if limit and wanted > limit:
                raise UnsupportedError(f"{name}={wanted}: teacher {info.teacher} takes at most {limit}; lower it")
