"""Students without a model: many clients in one process, each a tenant of its own. Started by other benchmarks.

`python -m benchmarks.students FIRST COUNT NUM_OPEN SECONDS`, the queue's URL on standard input. Each keeps so many
rollouts open; after the time no new ones are sent and the open ones are waited for. The last line printed is JSON:
what was sent, answered, answered again, and answered with somebody else's scores.
"""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.sleeping import TEACHER, VOCABULARY, expected_logprobs
from opd.client import ScoreClient
from opd.lifecycle import die_with_parent
from opd.types import ScoreRequest

NUM_PROMPT, NUM_RESPONSE = 64, 448
NUM_SIBLINGS = 4


@dataclass(kw_only=True, slots=True)
class Tally:
    """Of all students of this process."""

    sent: int = 0
    answered: int = 0
    duplicated: int = 0
    wrong: int = 0
    failed: int = 0


class Student:
    """One tenant."""

    def __init__(self, client: ScoreClient, number: int, tally: Tally) -> None:
        self._client = client
        self._tenant = f"student-{number}"
        self._random = np.random.default_rng(number)
        self._tally = tally
        self._num_sent = 0
        self._prompt = self._ids(NUM_PROMPT)

    async def ask_until(self, end_s: float) -> None:
        """One rollout after the other."""
        while time.monotonic() < end_s:
            request = self._request()
            self._tally.sent += 1
            try:
                reply = await self._client.score(request)
            except Exception as error:
                self._tally.failed += 1
                sys.stderr.write(f"{request.rollout_id}: {error!r}\n")
                continue
            self._tally.answered += 1
            found = reply.scores.sampled_logprobs
            is_right = found is not None and np.array_equal(found, expected_logprobs(request))
            self._tally.wrong += not (is_right and reply.rollout_id == request.rollout_id)

    def _request(self) -> ScoreRequest:
        if self._num_sent % NUM_SIBLINGS == 0:
            self._prompt = self._ids(NUM_PROMPT)
        self._num_sent += 1
        return ScoreRequest(
            rollout_id=f"run.0.{self._num_sent}",
            tenant=self._tenant,
            teacher=TEACHER,
            prompt_token_ids=self._prompt,
            response_token_ids=self._ids(NUM_RESPONSE),
        )

    def _ids(self, count: int) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
        return self._random.integers(0, VOCABULARY, count, dtype=np.int32)


async def run(url: str, numbers: range, num_open: int, duration_s: float) -> Tally:
    """All students of this process at once."""
    tally = Tally()
    clients = [ScoreClient.connect(url, teacher=TEACHER, tenant=f"student-{number}") for number in numbers]
    await asyncio.gather(*[client.open() for client in clients])
    students = [Student(client, number, tally) for client, number in zip(clients, numbers, strict=True)]
    end_s = time.monotonic() + duration_s
    await asyncio.gather(*[student.ask_until(end_s) for student in students for _ in range(num_open)])
    tally.duplicated = sum(client.stats.duplicates for client in clients)
    await asyncio.gather(*[client.close() for client in clients])
    return tally


def main() -> None:
    """Ends with its parent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=int, help="number of the first student")
    parser.add_argument("count", type=int, help="students")
    parser.add_argument("num_open", type=int, help="open rollouts of each")
    parser.add_argument("duration_s", type=float, help="seconds until no new ones are sent")
    given = parser.parse_args()
    die_with_parent()
    numbers = range(given.first, given.first + given.count)
    tally = asyncio.run(run(sys.stdin.readline().strip(), numbers, given.num_open, given.duration_s))
    sys.stdout.write(f"{json.dumps(asdict(tally))}\n")


if __name__ == "__main__":
    main()
