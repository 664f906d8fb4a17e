"""A fixed probe, scored at start and again and again: does the engine still say what it said?

The values of the first sound run are this process's golden ones. Rows that are not finite, uniform (every id at
-ln V, what a model without its weights answers) or different from the golden ones make the replica not ready. It runs
in the engine thread, alone and with fixed shapes, so that a repeat is equal to the last bit on a sound machine.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from opd.errors import NonFiniteError, OpdError
from opd.types import Capability, Floats, ScoreRequest, Scores, TeacherInfo
from services.teacher_server.engines.base import ScoringEngine

CANARY_ROLLOUT_ID = "canary"
_NUM_PROMPT, _NUM_RESPONSE = 8, 16
_UNIFORM_TOLERANCE = 1e-3
# A repeat in one process is bit-equal; this leaves room for kernels that are not.
_DRIFT_TOLERANCE = 1e-3


class CanaryState(StrEnum):
    """What the last probe said."""

    SOUND = "sound"
    NON_FINITE = "non_finite"
    UNIFORM = "uniform"
    DRIFTED = "drifted"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryVerdict:
    """State and, when it is not sound, one line on what was seen."""

    state: CanaryState
    reason: str = ""

    @property
    def is_sound(self) -> bool:
        return self.state is CanaryState.SOUND


class Canary:
    """The probe and its golden values."""

    def __init__(self, engine: ScoringEngine) -> None:
        self._engine = engine
        self._request = probe_request(engine.info())
        self._golden: Floats | None = None

    def check(self) -> CanaryVerdict:
        """Scores the probe; blocks, and never raises for what the engine does."""
        try:
            (outcome,) = self._engine.score([self._request])
        except Exception as error:
            return CanaryVerdict(state=CanaryState.FAILED, reason=f"the engine fails on the probe ({error!r:.200})")
        if isinstance(outcome, OpdError):
            is_nan = isinstance(outcome, NonFiniteError)
            return CanaryVerdict(
                state=CanaryState.NON_FINITE if is_nan else CanaryState.FAILED,
                reason=f"the probe is answered with an error ({outcome.message})",
            )
        return self._judge(outcome)

    def _judge(self, scores: Scores) -> CanaryVerdict:
        found_R, num_ids = scores.sampled_logprobs, self._engine.info().num_defined_ids
        if found_R is None or not np.isfinite(found_R).all():
            return CanaryVerdict(state=CanaryState.NON_FINITE, reason="the probe's log-probs are NaN or infinite")
        if num_ids > 1 and np.abs(found_R + math.log(num_ids)).max() < _UNIFORM_TOLERANCE:
            return CanaryVerdict(
                state=CanaryState.UNIFORM,
                reason=f"the probe's log-probs are all -ln {num_ids}: the weights carry nothing",
            )
        if self._golden is None:
            self._golden = found_R
        drift = float(np.abs(found_R - self._golden).max())
        if drift > _DRIFT_TOLERANCE:
            return CanaryVerdict(
                state=CanaryState.DRIFTED, reason=f"the probe's log-probs moved by {drift:.3g} since the start"
            )
        return CanaryVerdict(state=CanaryState.SOUND)


def probe_request(info: TeacherInfo) -> ScoreRequest:
    """Ids spread over the whole vocabulary, cut to what the context holds."""
    num_tokens = max(2, min(_NUM_PROMPT + _NUM_RESPONSE, info.max_context))
    ids = (np.arange(1, num_tokens + 1, dtype=np.int64) * 7919 % info.num_defined_ids).astype(np.int32)
    num_prompt = max(1, num_tokens * _NUM_PROMPT // (_NUM_PROMPT + _NUM_RESPONSE))
    return ScoreRequest(
        rollout_id=CANARY_ROLLOUT_ID,
        tenant=CANARY_ROLLOUT_ID,
        teacher=info.teacher,
        prompt_token_ids=ids[:num_prompt],
        response_token_ids=ids[num_prompt:],
        batch_invariant=Capability.BATCH_INVARIANT in info.capabilities,
    )
