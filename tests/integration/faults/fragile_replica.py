"""A teacher process of the real composition root around an engine that breaks when it is told to.

`python -m tests.integration.faults.fragile_replica --ready-file PATH tokens_per_s=N name.part=value...`. What it
answers tells which request it answers. A prompt with `POISON_ID` ends the process on the spot, as a fault in a driver
would; after SIGUSR1 its weights are NaN.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opd.errors import NonFiniteError, OpdError
from opd.lifecycle import die_with_parent
from opd.logs import configure_logging
from opd.settings import load_settings
from opd.types import Floats, ScoreRequest, Scores, TeacherInfo
from services.teacher_server.config import TeacherConfig
from services.teacher_server.engines.base import ForwardObserver, ForwardReport
from services.teacher_server.server import Replica
from tests.unit.teacher_server.fake_engine import fake_info

POISON_ID = 66
WEIGHTS_V = -np.log(np.arange(2, 92)) - 1 / 3


def expected_logprobs(request: ScoreRequest) -> Floats:
    """Of prompt and response alike, so that a mix-up of two requests shows."""
    return (WEIGHTS_V[request.response_token_ids] - request.prompt_token_ids.sum() % 101).astype(np.float32)


class FragileEngine:
    """`tokens_per_s` whatever the batch."""

    def __init__(self, tokens_per_s: float, observe: ForwardObserver) -> None:
        self._tokens_per_s = tokens_per_s
        self._observe = observe
        self._weights_V = WEIGHTS_V.copy()

    def info(self) -> TeacherInfo:
        return fake_info()

    def lose_weights(self) -> None:
        self._weights_V[:] = np.nan

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores | OpdError]:
        num_tokens = sum(request.num_tokens for request in requests)
        time.sleep(num_tokens / self._tokens_per_s)
        if any(POISON_ID in request.prompt_token_ids for request in requests):
            os._exit(9)
        report = ForwardReport(
            num_requests=len(requests), num_tokens=num_tokens, num_padded_tokens=num_tokens, duration_s=0.0
        )
        self._observe(report)
        return [self._one(request) for request in requests]

    def forget(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing to free."""

    def _one(self, request: ScoreRequest) -> Scores | OpdError:
        if not np.isfinite(self._weights_V[request.response_token_ids]).all():
            return NonFiniteError(f"rollout {request.rollout_id}: not finite")
        return Scores(sampled_logprobs=expected_logprobs(request))


def main() -> int:
    """The same steps as `run_teacher`, with another engine and no model folder."""
    ready_file, rate, *overrides = sys.argv[2:]
    config = load_settings(TeacherConfig, None, ["model=fragile", "teacher=tiny", *overrides])
    configure_logging(config.log_level, as_json=False)
    die_with_parent()

    def make_engine(observe: ForwardObserver) -> FragileEngine:
        engine = FragileEngine(float(rate.partition("=")[2]), observe)
        loop.call_soon_threadsafe(loop.add_signal_handler, signal.SIGUSR1, engine.lose_weights)
        return engine

    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        return runner.run(Replica(config, Path(ready_file), make_engine).serve())


if __name__ == "__main__":
    sys.exit(main())
