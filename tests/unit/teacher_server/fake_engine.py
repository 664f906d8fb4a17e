"""An engine without a model: answers at once, or when it is let, and fails where it is told to."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import numpy as np

from opd.errors import NonFiniteError, OpdError
from opd.types import Capability, ScoreRequest, Scores, TeacherInfo
from services.teacher_server.engines.base import ForwardReport

CRASH_ID, NAN_ID = 66, 77


def fake_info(**changes: object) -> TeacherInfo:
    fields: dict[str, object] = {
        "teacher": "tiny",
        "fingerprint": "f" * 16,
        "model": "fake",
        "engine": "fake",
        "vocab_rows": 96,
        "num_defined_ids": 90,
        "id_map_hash": "0" * 32,
        "max_context": 128,
        "max_candidates": 8,
        "max_score_top_k": 16,
        "max_batch_tokens": 1000,
        "max_message_bytes": 1 << 20,
        "capabilities": frozenset(Capability) - {Capability.HIDDEN_STATES},
    }
    return TeacherInfo(**(fields | changes))  # type: ignore[arg-type]


class FakeEngine:
    """Log-prob of id v is -v / 10; a prompt with `CRASH_ID` raises, one with `NAN_ID` comes out non-finite."""

    def __init__(self, info: TeacherInfo | None = None) -> None:
        self._info = info or fake_info()
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.shift = 0.0
        self.is_broken = False
        self.num_forgotten = 0
        self.is_closed = False
        self.observe: Callable[[ForwardReport], None] | None = None

    def info(self) -> TeacherInfo:
        return self._info

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores | OpdError]:
        self.batches.append([request.rollout_id for request in requests])
        if not self.gate.wait(20):
            raise TimeoutError("the test never opened the gate")
        if self.is_broken or any(CRASH_ID in request.prompt_token_ids for request in requests):
            raise RuntimeError("device-side assert")
        if self.observe:
            num_tokens = sum(request.num_tokens for request in requests)
            report = ForwardReport(
                num_requests=len(requests), num_tokens=num_tokens, num_padded_tokens=num_tokens, duration_s=0.0
            )
            self.observe(report)
        return [self._one(request) for request in requests]

    def forget(self) -> None:
        self.num_forgotten += 1

    def close(self) -> None:
        self.is_closed = True

    @property
    def scored(self) -> list[list[str]]:
        """Batches without the probe's."""
        return [batch for batch in self.batches if batch != ["canary"]]

    def _one(self, request: ScoreRequest) -> Scores | OpdError:
        if NAN_ID in request.prompt_token_ids:
            return NonFiniteError(f"rollout {request.rollout_id}: not finite")
        return Scores(sampled_logprobs=(request.response_token_ids / -10 + self.shift).astype(np.float32))


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what other tasks will make true."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it never came true")
