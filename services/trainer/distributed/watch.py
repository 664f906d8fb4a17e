"""Ranks that look after each other, so that none waits for one that is gone.

Every rank counts up a beat of its own in the store that torchrun keeps, and reads the others'. One that has failed says
so there; one that was killed falls silent. Whoever notices gives its own main thread a moment to end by itself, which
it cannot inside a collective, and then ends the process: the launcher may be gone as well, or be none.
"""

import json
import logging
import os
import threading
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from opd.errors import OpdError, RankLostError

_log = logging.getLogger(__name__)
GRACE_S = 10.0
"""From noticing to the end of the process, if it has not ended by itself."""
_FAILED = "failed"
_POLL_S = 0.5
_CLOSE_S = 5.0


class RankWatch:
    """One thread over a connection of its own to the store. `close` when all ranks are done, or this one has failed."""

    def __init__(self, store: Store, *, rank: int, num_ranks: int, silence_s: float) -> None:
        """`silence_s`: how long another rank's beat may stand still [s]; holding Python's lock that long is silence."""
        self._store = store
        self._rank = rank
        self._others = [other for other in range(num_ranks) if other != rank]
        self._silence_s = silence_s
        self._lost: RankLostError | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> RankLostError | None:
        """Which rank is gone, once one is."""
        return self._lost

    def wait_lost(self, limit_s: float) -> RankLostError | None:
        """The same, waiting for it: a broken connection is felt before its reason is known."""
        deadline = time.monotonic() + limit_s
        while self._lost is None and time.monotonic() < deadline and not self._closing.is_set():
            time.sleep(_POLL_S / 5)
        return self._lost

    def announce(self, error: BaseException) -> None:
        """Tells the others that this rank ends by `error`; the first to say so is heard."""
        if isinstance(error, RankLostError):
            return
        message = error.message if isinstance(error, OpdError) else f"{type(error).__name__}: {error}"
        try:
            self._store.compare_set(_FAILED, "", json.dumps({"rank": self._rank, "message": message[:500]}))
        except (RuntimeError, OSError):
            # Then the store is gone, which the others have noticed as well.
            _log.debug("the store is gone", exc_info=True)

    def close(self) -> None:
        """Ends the watch; nobody is missed from here on."""
        self._closing.set()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        beats = {other: (0, time.monotonic()) for other in self._others}
        count = 0
        while not self._closing.wait(_POLL_S):
            count += 1
            try:
                self._lost = self._look(count, beats)
            except (RuntimeError, OSError) as error:
                self._lost = RankLostError(
                    f"the launcher's store is gone ({str(error).strip().splitlines()[0][:120]}), and so is whoever "
                    "kept it; start the run again with --resume"
                )
            if self._lost is not None:
                self._end()
                return

    def _look(self, count: int, beats: dict[int, tuple[int, float]]) -> RankLostError | None:
        """Counts up, and says who is gone."""
        self._store.set(f"beat/{self._rank}", str(count))
        if self._store.check([_FAILED]):
            told = json.loads(self._store.get(_FAILED))
            if told["rank"] != self._rank:
                return RankLostError(f"rank {told['rank']} has failed: {told['message']}")
        now = time.monotonic()
        for other, (last, since) in beats.items():
            key = f"beat/{other}"
            found = int(self._store.get(key)) if self._store.check([key]) else 0
            if found != last:
                beats[other] = (found, now)
            elif now - since > self._silence_s:
                return RankLostError(
                    f"rank {other} has been silent for {self._silence_s:.0f} s, so it was killed or hangs; start the "
                    "run again with --resume"
                )
        return None

    def _end(self) -> None:
        assert self._lost is not None
        _log.error("%s", self._lost.message)
        if not self._closing.wait(GRACE_S):
            # The main thread waits for a rank that will never come, and nothing in Python can reach it there.
            os._exit(1)


def store_connection(host: str, port: int, prefix: str, timeout_s: float) -> Store:
    """A connection of one's own to the launcher's store: one that is shared would wait while another part waits."""
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
    return PrefixStore(prefix, store)
