"""How many threads torch computes with, by what a step is doing.

While a step samples, a teacher on the same machine scores what has ended; threads of two processes that wait for each
other on the same few cores cost many times what they gain (docs/decisions/0003-threads-on-few-cores.md). While the
student is updated, that teacher has nothing to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def computing_with(num_threads: int | None) -> Iterator[None]:
    """So many threads for what this thread computes inside, then as many as before; None changes nothing."""
    if num_threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
