"""Where the seconds of a step went, each of them to one part."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = ("rollout", "grade", "score_wait", "forward_backward", "optimizer", "publish")
"""What a step consists of; all are told, also where one took no time."""


class StepClock:
    """`PARTS` may be nested: what the inner one takes does not count for the outer one."""

    def __init__(self) -> None:
        self._begun = self._since = time.perf_counter()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within, time goes to `name`."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def timings_s(self) -> dict[str, float]:
        """Seconds by part, and `step` for all since the clock was made."""
        return self._seconds | {"step": time.perf_counter() - self._begun}

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now
