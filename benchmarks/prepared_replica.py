"""A replica as a process, whose engine answers at once with scores made beforehand; other benchmarks start it.

`python -m benchmarks.prepared_replica RESPONSE_TOKENS BATCH_REQUESTS`, the queue's URL on standard input. Says `ready`
on standard output and runs until SIGTERM. Everything around the engine is the real thing (checks, batcher, queue
intake, encoding), so that the process's CPU time is what a replica needs beside its model.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.sleeping import SleepingEngine, serving
from benchmarks.wire_traffic import TEACHER, Exchange, Shape, make_exchange
from opd.errors import OpdError
from opd.lifecycle import Shutdown, die_with_parent
from opd.types import Capability, Encoding, ScoreRequest, Scores, TeacherInfo
from services.teacher_server.canary import CANARY_ROLLOUT_ID
from services.teacher_server.config import BatchingSettings, TeacherConfig

K = 16
NUM_DISTINCT = 8
VOCABULARY = 151_936
PROMPT_SHARE = 7
"""Response tokens of a prompt token, as in docs/decisions/0006-bytes-on-the-wire.md."""


def make_exchanges(num_response: int) -> list[Exchange]:
    """The same in every process: requests with k candidates and top-k, and what is answered."""
    shape = Shape(
        num_rollouts=NUM_DISTINCT, num_prompt=max(num_response // PROMPT_SHARE, 1), num_response=num_response,
        vocabulary=VOCABULARY, overlap=0.8,
    )  # fmt: skip
    return [make_exchange(shape, K, Encoding.FLOAT16, index) for index in range(NUM_DISTINCT)]


class PreparedEngine(SleepingEngine):
    """Knows an answer by the last number of the rollout's id."""

    def __init__(self, num_response: int) -> None:
        super().__init__(0.0)
        self._answers = [exchange.reply.scores for exchange in make_exchanges(num_response)]

    def info(self) -> TeacherInfo:
        able = {Capability.CANDIDATE_LOGPROBS, Capability.TEACHER_TOP_K, Capability.ENTROPY}
        plain = super().info()
        return replace(
            plain, teacher=TEACHER, vocab_rows=VOCABULARY, num_defined_ids=VOCABULARY, max_candidates=K,
            max_score_top_k=K, capabilities=plain.capabilities | able,
        )  # fmt: skip

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores | OpdError]:
        if requests[0].rollout_id == CANARY_ROLLOUT_ID:
            return super().score(requests)
        return [self._answers[int(request.rollout_id.rpartition(".")[2]) % NUM_DISTINCT] for request in requests]


async def serve(url: str, num_response: int, batch_requests: int) -> None:
    """Until SIGTERM."""
    shutdown = Shutdown()
    shutdown.install(asyncio.get_running_loop())
    num_tokens = num_response + max(num_response // PROMPT_SHARE, 1)
    batching = BatchingSettings(max_batch_tokens=batch_requests * num_tokens)
    config = TeacherConfig(model="prepared", teacher=TEACHER, replica=f"of-{num_response}", batching=batching)
    async with serving(url, PreparedEngine(num_response), config):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await shutdown.requested.wait()


def main() -> None:
    """Ends with its parent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("response_tokens", type=int, help="of each request")
    parser.add_argument("batch_requests", type=int, help="of a batch at most")
    given = parser.parse_args()
    die_with_parent()
    asyncio.run(serve(sys.stdin.readline().strip(), given.response_tokens, given.batch_requests))


if __name__ == "__main__":
    main()
