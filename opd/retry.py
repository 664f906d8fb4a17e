"""The one place that tries again: bounded attempts, growing pauses, a total budget.

Every other layer passes errors and deadlines on. What may be repeated is the caller's to say (`is_retryable`); an
operation given here must be safe to repeat.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryRules:
    """How long and how often to try."""

    total_s: float
    """Budget from the first attempt on, pauses included; the attempt that overruns it is the last."""
    attempt_timeout_s: float | None = None
    """Bound of one attempt; running into it counts as a TimeoutError."""
    first_delay_s: float = 0.05
    max_delay_s: float = 2.0

    def delays(self, random_unit: Callable[[], float] = random.random) -> Iterator[float]:
        """Endless pauses that double up to the maximum, each shortened by up to half so that callers spread out."""
        delay_s = self.first_delay_s
        while True:
            yield delay_s * (0.5 + 0.5 * random_unit())
            delay_s = min(delay_s * 2, self.max_delay_s)


async def retry(
    operation: Callable[[], Awaitable[_T]],
    *,
    rules: RetryRules,
    is_retryable: Callable[[Exception], bool],
    on_failure: Callable[[Exception], None] | None = None,
) -> _T:
    """Runs `operation` until it succeeds, fails for good, or the budget is spent; then raises its last error."""
    give_up_at = time.monotonic() + rules.total_s
    for attempt, delay_s in enumerate(rules.delays(), start=1):
        try:
            async with asyncio.timeout(rules.attempt_timeout_s):
                return await operation()
        except Exception as error:
            if not is_retryable(error):
                raise
            if on_failure is not None:
                on_failure(error)
            # Whoever refused may know better when there will be room.
            pause_s = max(delay_s, getattr(error, "retry_after_s", None) or 0.0)
            if time.monotonic() + pause_s > give_up_at:
                raise
            _log.debug("attempt %d failed (%s), again in %.2f s", attempt, error, pause_s)
        await asyncio.sleep(pause_s)
    raise AssertionError("delays() never ends")
