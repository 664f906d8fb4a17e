"""A replica with the sleeping engine as a process of its own: no torch, no listeners. Started by other benchmarks.

`python -m benchmarks.sleeping_replica NAME TOKENS_PER_S BATCH_TOKENS`, the queue's URL on standard input. Says `ready`
on standard output and runs until SIGTERM.
"""

import argparse
import asyncio
import sys

from benchmarks.sleeping import TEACHER, SleepingEngine, serving
from opd.lifecycle import Shutdown, die_with_parent
from services.teacher_server.config import BatchingSettings, TeacherConfig


async def serve(url: str, name: str, tokens_per_s: float, batch_tokens: int) -> None:
    """Until SIGTERM."""
    shutdown = Shutdown()
    shutdown.install(asyncio.get_running_loop())
    batching = BatchingSettings(max_batch_tokens=batch_tokens)
    config = TeacherConfig(model="sleeping", teacher=TEACHER, replica=name, batching=batching)
    async with serving(url, SleepingEngine(tokens_per_s), config):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await shutdown.requested.wait()


def main() -> None:
    """Ends with its parent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the replica")
    parser.add_argument("tokens_per_s", type=float, help="speed of the engine; 0 answers at once")
    parser.add_argument("batch_tokens", type=int, help="of a batch at most")
    given = parser.parse_args()
    die_with_parent()
    asyncio.run(serve(sys.stdin.readline().strip(), given.name, given.tokens_per_s, given.batch_tokens))


if __name__ == "__main__":
    main()
