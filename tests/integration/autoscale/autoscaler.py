"""What KEDA and the horizontal autoscaler make of a ScaledObject, and a thread that does it to real replicas.

From none to one and back is KEDA's: any value above `activationTargetValue` wakes, and `cooldownPeriod` after the last
one the pool sleeps (never before `initialCooldownPeriod`). Between one and the maximum is the autoscaler's: the value
over `targetValue`, up at once, down only to the most that was wanted within the stabilization window. A value that
cannot be read changes nothing.
"""

import math
import threading
import time
from collections import deque
from typing import Any

import httpx

from tests.integration.autoscale.pods import Cluster, Teacher


class Decision:
    """The arithmetic; times are divided by `haste`.

    `initialCooldownPeriod` is over when `may_sleep` is set: it is longer than the longest start (a unit test holds it
    against the startup probe), and how long a start takes depends on the machine.
    """

    def __init__(self, scaled_object: dict[str, Any], haste: float) -> None:
        spec = scaled_object["spec"]
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        metadata = spec["triggers"][0]["metadata"]
        self._most = int(spec["maxReplicaCount"])
        self._target = float(metadata["targetValue"])
        self._activation = float(metadata["activationTargetValue"])
        self._cooldown_s = spec["cooldownPeriod"] / haste
        self._stabilization_s = behavior["scaleDown"]["stabilizationWindowSeconds"] / haste
        self.may_sleep = False
        self._active_at_s = float("-inf")
        self._wanted: deque[tuple[float, int]] = deque()

    def replicas(self, value: float | None, current: int, now_s: float) -> int:
        """How many there should be."""
        if value is None:
            return current
        if value > self._activation:
            self._active_at_s = now_s
        elif self.may_sleep and now_s > self._active_at_s + self._cooldown_s:
            return 0
        if current == 0:
            return 1 if value > self._activation else 0
        self._wanted.append((now_s, min(self._most, max(1, math.ceil(value / self._target)))))
        while self._wanted[0][0] < now_s - self._stabilization_s:
            self._wanted.popleft()
        newest = self._wanted[-1][1]
        return newest if newest >= current else min(current, max(count for _, count in self._wanted))


class Autoscaler:
    """Starts and ends replicas of a cluster until `stop`; what it saw and did is kept.

    What goes wrong in its thread is raised to whoever looks at it next, and by `stop`.
    """

    def __init__(self, cluster: Cluster, scaled_object: dict[str, Any], haste: float) -> None:
        spec = scaled_object["spec"]
        self._cluster = cluster
        self._metadata = spec["triggers"][0]["metadata"]
        self._pause_s = spec["pollingInterval"] / haste
        self.decision = Decision(scaled_object, haste)
        # A Deployment without a number has one.
        self._teachers = [Teacher(cluster)]
        self.ended: list[Teacher] = []
        self._history: list[int] = [1]
        self._error: Exception | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def teachers(self) -> list[Teacher]:
        """The replicas there are to be."""
        self.check()
        return self._teachers

    @property
    def history(self) -> list[int]:
        """Their numbers so far."""
        self.check()
        return self._history

    def check(self) -> None:
        """RuntimeError where it no longer scales."""
        if self._error is not None:
            raise RuntimeError(f"the autoscaler ended: {self._error!r}") from self._error

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(60)
        self.check()
        assert not self._thread.is_alive(), "the autoscaler goes on"

    def read(self) -> float | None:
        """The trigger's value, by its URL and location."""
        url = self._metadata["url"]
        for address, port in self._cluster.ports.items():
            url = url.replace(address, f"127.0.0.1:{port}")
        try:
            answer = httpx.get(url, trust_env=False, timeout=5)
        except httpx.HTTPError:
            return None
        if answer.status_code != 200:
            return None
        found = answer.json()
        for name in self._metadata["valueLocation"].split("."):
            found = found[name]
        return float(found)

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._pause_s):
                self._scale()
        except Exception as error:
            self._error = error

    def _scale(self) -> None:
        wanted = self.decision.replicas(self.read(), len(self._teachers), time.monotonic())
        if wanted != len(self._teachers):
            self._history.append(wanted)
        while len(self._teachers) < wanted:
            self._teachers.append(Teacher(self._cluster))
        while len(self._teachers) > wanted:
            self.ended.append(self._teachers.pop())
            self.ended[-1].process.terminate()
