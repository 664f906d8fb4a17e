"""Forward passes side by side on a CPU, one thread each.

Passes know nothing of each other, so their threads wait for nobody, while the threads that share one pass meet after
every operation: a neighbour that takes a core for a moment stops them all (docs/decisions/0004-scoring-cost.md).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")


class PassWorkers:
    """Threads that are started when they are first needed. Called from the engine thread only."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._num_workers = 0

    def run(self, passes: Sequence[Callable[[], T]], num_workers: int) -> list[T]:
        """Results in order. Whoever is free takes the next pass; with one worker the caller runs them itself.

        Raises what the first of the failed passes raised, once none is running any more.
        """
        if num_workers == 1 or len(passes) == 1:
            return [run() for run in passes]
        executor = self._started(num_workers)
        futures = [executor.submit(_inferred, run) for run in passes]
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the threads."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def _started(self, num_workers: int) -> ThreadPoolExecutor:
        if self._executor is None or self._num_workers != num_workers:
            self.close()
            self._num_workers = num_workers
            self._executor = _executor(num_workers)
        return self._executor


def _executor(num_workers: int) -> ThreadPoolExecutor:
    """All its threads, started. torch's number belongs to a thread, but is the default of those that come later."""
    num_threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="pass", initializer=_use_one_thread)
    all_started = Barrier(num_workers)
    wait([executor.submit(all_started.wait) for _ in range(num_workers)])
    # Whatever computes in a thread that starts later is not to be left with one.
    torch.set_num_threads(num_threads)
    return executor


def _use_one_thread() -> None:
    # Asking first has the thread take the default now; its first operation would take the restored one otherwise.
    torch.get_num_threads()
    torch.set_num_threads(1)


def _inferred(run: Callable[[], T]) -> T:
    # The mode belongs to a thread.
    with torch.inference_mode():
        return run()
