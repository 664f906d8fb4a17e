"""`opd redis`: a Redis for one machine in the foreground, with the settings the queue needs.

For looking around and for a laptop; it listens on a Unix socket that only its user can open. A pool over several
machines has a Redis of its own, see docker-compose.yml for the settings.
"""

import signal
import sys
from pathlib import Path

from opd.errors import QueueUnavailableError
from opd.queue.embedded import EmbeddedRedis

_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_LOOK_S = 0.5


def serve_redis(data_dir: Path) -> int:
    """Serves until SIGINT or SIGTERM; the first line printed is its URL. Data stays in the folder."""
    with EmbeddedRedis(data_dir) as redis:
        # After the start, because a child inherits what is blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        sys.stdout.write(f"{redis.url}\n")
        sys.stdout.flush()
        while signal.sigtimedwait(_STOP_SIGNALS, _LOOK_S) is None:
            if not redis.is_running:
                raise QueueUnavailableError(f"redis in {data_dir} ended by itself; see {data_dir / 'redis.log'}")
    return 0
