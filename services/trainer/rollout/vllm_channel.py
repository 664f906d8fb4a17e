"""What the trainer and its rollout engine say to each other: JSON and arrays over a socket that both inherit.

Each message is a JSON header (kind, the call it belongs to, fields, dtype and shape of the arrays) and then the arrays'
bytes. Nothing is pickled. Light: both sides import it before anything heavy.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message. Example: ``Message(kind="load", call=3, fields={"version": 7, "folder": "/dev/shm/x"})``."""

    kind: str
    call: int
    """Which question of the trainer's it asks or answers."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: tuple[Array, ...] = ()


class Channel:
    """One end. Sending is safe from several threads, receiving is one thread's."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: Message, *, turn_s: float = -1) -> None:
        """Raises OSError when the other side is gone.

        `BlockingIOError` where the socket has a limit on sending, or another thread's message takes longer than
        `turn_s`; -1 waits for it.
        """
        arrays = [np.ascontiguousarray(array) for array in message.arrays]
        header = {
            "kind": message.kind,
            "call": message.call,
            "fields": dict(message.fields),
            "arrays": [[array.dtype.str, list(array.shape)] for array in arrays],
        }
        if not self._lock.acquire(timeout=turn_s):
            raise BlockingIOError("another message is still being sent")
        try:
            self._connection.send_bytes(json.dumps(header).encode())
            for array in arrays:
                # A memoryview cast to bytes refuses shapes with a zero.
                self._connection.send_bytes(array.tobytes())
        finally:
            self._lock.release()

    def receive(self) -> Message:
        """Waits for a message; raises EOFError or OSError when the other side is gone."""
        header = json.loads(self._connection.recv_bytes())
        arrays = [self._array(dtype, shape) for dtype, shape in header["arrays"]]
        return Message(kind=header["kind"], call=header["call"], fields=header["fields"], arrays=tuple(arrays))

    def close(self) -> None:
        """Nobody may be about to receive; waits for whoever sends."""
        with self._lock:
            self._connection.close()

    def _array(self, dtype: str, shape: Sequence[int]) -> Array:
        # A copy: frombuffer's result cannot be written to.
        return np.frombuffer(self._connection.recv_bytes(), dtype=dtype).reshape(shape).copy()
