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
from services.trainer.journey import RolloutJourney

_log = logging.getLogger(__name__)
_POLL_S = 1.0
_MESSAGE_EVERY_S = 15.0
_METRICS = {
    Capability.SAMPLED_LOGPROBS: ("rollout/sampled_reverse_kl", "rollout/teacher_reward", "outcome/auroc"),
    Capability.CANDIDATE_LOGPROBS: ("loss/reverse_kl", "distill/extreme_prob_gap"),
    Capability.TEACHER_TOP_K: ("distill/overlap_* and distill/mass99_overlap",),
    Capability.ENTROPY: ("distill/entropy_teacher", "distill/entropy_gap"),
}
"""Asked for wherever a teacher supplies it, and what the metrics lack where it does not."""


MOVED = "+"
"""Stands in a fingerprint between the teacher's identity and the number of steps by which it has moved as it should."""


def fixed_part(fingerprint: str) -> str:
    """What another teacher would have another one of: all of it, but for the steps that a moving average counts."""
    return fingerprint.partition(MOVED)[0]


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
    needs: frozenset[Capability] = frozenset({Capability.CANDIDATE_LOGPROBS})
    """What the objective trains on: a teacher without it is refused. Hidden states are asked for only where they are
    needed; everything else is asked for wherever the teacher has it, because the metrics read it."""
    teacher_temperature: float = 1.0
    encoding: Encoding = Encoding.FLOAT32
    batch_invariant: bool = False
    timeout_ms: int = 300_000
    max_context: int = 0
    """Longest prompt plus response the run can produce."""
    longest_prompt: str = ""
    """Which prompt is longest as the teacher sees it, which may be longer than the student's."""
    longest_context: int = 0
    """Its tokens plus those of the longest response."""


class TeacherClient:
    """Sends rollouts to one pool and checks what comes back."""

    def __init__(self, client: ScoreClient, wants: ScoreWants, *, vocabulary: Vocabulary, student_name: str) -> None:
        self._client = client
        self._wants = wants
        self._vocabulary = vocabulary
        self._student_name = student_name
        self._info: TeacherInfo | None = None
        self._known: dict[str, TeacherInfo] = {}
        """Every teacher accepted so far, by the fixed part of its fingerprint."""
        self._pinned_at_s = time.time()
        self._told: list[Capability] = []

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
        self._pinned_at_s = time.time()
        try:
            current = self._client.info()
        except TeacherUnavailableError as error:
            # Requests wait in the queue while nobody serves, so the step may begin with the teacher known so far.
            _log.warning("teacher info is not to be had (%s), keeping %s", error.message, self.info.fingerprint)
            return self.info.fingerprint
        if current.fingerprint != self.info.fingerprint:
            if fixed_part(current.fingerprint) != fixed_part(self.info.fingerprint):
                _log.warning("teacher changed from %s to %s", self.info.fingerprint, current.fingerprint)
            self._accept(current)
        return self.info.fingerprint

    def try_scoring(self, rollout_id: str) -> None:
        """Has one token scored as rollouts will be: what would refuse the first of them refuses this.

        A right that the handshake does not show is asked for by using it, such as the one to hidden states, which a
        cached output head does without. Raises what the request is refused with.
        """
        token = np.zeros(1, np.int32)
        wants = self._wants
        request = ScoreRequest(
            rollout_id=rollout_id,
            tenant=wants.tenant,
            teacher=wants.teacher,
            prompt_token_ids=token,
            response_token_ids=token,
            wants_hidden_states=Capability.HIDDEN_STATES in wants.needs,
            timeout_ms=wants.timeout_ms,
            teacher_fingerprint=self.info.fingerprint,
        )
        self._client.submit(request).result()

    def send(self, rollout: Rollout, teacher_prompt_token_ids: Ids) -> Future[ScoreReply]:
        """Asks for what the objective needs, and for what else the teacher supplies of what the metrics read.

        That is its log-probs at the rollout's sampled and support ids, its own top-k, and entropy.
        """
        wants, asked = self._wants, self._asked_of(rollout, self.info)
        with RolloutJourney.begin(
            rollout, tenant=wants.tenant, teacher=wants.teacher, sampling_s=self._pinned_at_s
        ) as sending:
            request = ScoreRequest(
                rollout_id=rollout.rollout_id,
                tenant=wants.tenant,
                teacher=wants.teacher,
                prompt_token_ids=teacher_prompt_token_ids,
                response_token_ids=rollout.response_token_ids,
                candidate_token_ids=rollout.topk_token_ids if Capability.CANDIDATE_LOGPROBS in asked else None,
                score_top_k=wants.score_top_k if Capability.TEACHER_TOP_K in asked else 0,
                wants_sampled=Capability.SAMPLED_LOGPROBS in asked,
                wants_entropy=Capability.ENTROPY in asked,
                wants_hidden_states=Capability.HIDDEN_STATES in asked,
                teacher_temperature=wants.teacher_temperature,
                encoding=wants.encoding,
                batch_invariant=wants.batch_invariant,
                timeout_ms=wants.timeout_ms,
                teacher_fingerprint=self.info.fingerprint,
                traceparent=sending.traceparent,
            )
            return sending.follow(self._client.submit(request))

    def accept(self, rollout: Rollout, reply: ScoreReply, fingerprint: str | None = None) -> Scores:
        """The scores of a reply that fits; `InternalError` for another shape, `NonFiniteError` for NaN or infinity.

        `fingerprint` is what was pinned when the rollout was sent, where that may be another by now.
        """
        pinned = self.info.fingerprint if fingerprint is None else fingerprint
        if reply.teacher_fingerprint != pinned:
            raise InternalError(
                f"rollout {rollout.rollout_id}: scored by teacher {reply.teacher_fingerprint} and not by the pinned "
                f"{pinned}"
            )
        num_positions, num_candidates = rollout.topk_token_ids.shape
        # Another teacher may be pinned by now, with other capabilities.
        info = self._known[fixed_part(pinned)]
        scores, asked = reply.scores, self._asked_of(rollout, info)
        columns = {
            Capability.SAMPLED_LOGPROBS: ("sampled_logprobs", scores.sampled_logprobs, (num_positions,)),
            Capability.CANDIDATE_LOGPROBS: (
                "candidate_logprobs",
                scores.candidate_logprobs,
                (num_positions, num_candidates),
            ),
            Capability.TEACHER_TOP_K: ("topk_logprobs", scores.topk_logprobs, (num_positions, self._wants.score_top_k)),
            Capability.HIDDEN_STATES: ("hidden_states", scores.hidden_states, (num_positions, info.hidden_size)),
        }
        for name, values, shape in (column for capability, column in columns.items() if capability in asked):
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
        self._tell_what_is_absent(info)
        self._info = self._known[fixed_part(info.fingerprint)] = info
        return info

    def _check_capabilities(self, info: TeacherInfo) -> None:
        needed = set(self._wants.needs)
        if self._wants.teacher_temperature != 1.0:
            needed.add(Capability.TEACHER_TEMPERATURE)
        if self._wants.batch_invariant:
            needed.add(Capability.BATCH_INVARIANT)
        missing = sorted(needed - info.capabilities)
        if missing:
            raise UnsupportedError(
                f"teacher {info.teacher} ({info.engine}) cannot supply {', '.join(missing)}; use a teacher that does "
                "(engine=transformers; for hidden states hidden_states.enabled=true), or an objective that does without"
            )

    def _check_limits(self, info: TeacherInfo) -> None:
        asked = self._asked(info)
        score_top_k = "objective.score_top_k", self._wants.score_top_k
        limits = [("rollout.max_prompt_tokens + max_response_tokens", self._wants.max_context, info.max_context)]
        limits += [(*score_top_k, info.max_score_top_k)] if Capability.TEACHER_TOP_K in asked else []
        limits += [(*score_top_k, info.max_candidates)] if Capability.CANDIDATE_LOGPROBS in asked else []
        for name, wanted, limit in limits:
            # 0 means that the teacher states no limit.
            if limit and wanted > limit:
                raise UnsupportedError(f"{name}={wanted}: teacher {info.teacher} takes at most {limit}; lower it")
        if info.max_context and self._wants.longest_context > info.max_context:
            raise UnsupportedError(
                f"{self._wants.longest_prompt}: as the teacher sees it and with rollout.max_response_tokens it is "
                f"{self._wants.longest_context} tokens, teacher {info.teacher} takes at most {info.max_context}; "
                "shorten data.teacher_context or rollout.max_response_tokens"
            )

    def _asked(self, info: TeacherInfo) -> frozenset[Capability]:
        """What every request asks of this teacher."""
        return self._wants.needs | (info.capabilities & _METRICS.keys())

    def _asked_of(self, rollout: Rollout, info: TeacherInfo) -> frozenset[Capability]:
        """A rollout without ids of the student's has no candidates."""
        asked = self._asked(info)
        return asked if rollout.topk_token_ids.shape[1] else asked - {Capability.CANDIDATE_LOGPROBS}

    def _tell_what_is_absent(self, info: TeacherInfo) -> None:
        missing = [capability for capability in _METRICS if capability not in info.capabilities]
        if missing and missing != self._told:
            absent = ", ".join(name for capability in missing for name in _METRICS[capability])
            _log.warning(
                "teacher %s (%s) does not supply %s, so these metrics are absent: %s",
                *(info.teacher, info.engine, ", ".join(missing), absent),
            )
        self._told = missing
