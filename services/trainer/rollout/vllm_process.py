"""The trainer's end of the engine's process: starts it, asks it, notices when it is gone, ends it.

One call is open at a time, so weights never change while something is sampled. A thread reads, so that a signal which
interrupts the caller leaves no message half read. An engine that reads nothing fills the socket between them: sending
has its limit too, and an engine that has half a message is of no more use and is killed.
"""

import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import opd
from opd.errors import ConfigError, InternalError, RolloutEngineError, from_code
from services.trainer.rollout.vllm_channel import Array, Channel, Message
from services.trainer.rollout.vllm_environment import without_launcher

_CLOSE_S = 5.0
_LONGEST_S = 1e9


class VllmProcess:
    """A running engine. Closing it leaves no process."""

    def __init__(self, *, python: Path | None, environment: Mapping[str, str], log: Path, patience_s: float) -> None:
        """Starts the process; `log` gets what it and vLLM print. Nothing is loaded yet."""
        self._log = log
        self._patience_s = patience_s
        self._turn = threading.Lock()
        self._last_call = 0
        self._answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            try:
                self._process = subprocess.Popen(
                    [str(python or sys.executable), "-m", "services.trainer.rollout.vllm_worker", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**without_launcher(os.environ), **environment},
                    pass_fds=[theirs.fileno()],
                )
            except OSError as error:
                ours.close()
                raise ConfigError(f"rollout.vllm.python={python}: cannot be started ({error.strerror})") from error
        self._socket = ours
        self._channel = Channel(Connection(os.dup(ours.fileno())))
        self._reader = threading.Thread(target=self._read, name="rollout-engine", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, options: Mapping[str, Any], weights_root: Path) -> int:
        """Loads the model; returns the longest context. `ConfigError` when that fails."""
        try:
            started = self.ask("start", {"options": dict(options), "weights_root": str(weights_root)})
        except RolloutEngineError as error:
            raise ConfigError(f"rollout.engine=vllm: it did not start ({error.message})") from error
        if started["version"] != opd.__version__:
            raise ConfigError(
                f"rollout.vllm.python has version {started['version']} of this project, the trainer {opd.__version__}; "
                "run scripts/setup_vllm.sh again"
            )
        return int(started["max_context"])

    def ask(self, kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """A call with one answer; raises its error."""
        with closing(self.converse(kind, fields)) as messages:
            for message in messages:
                if message.kind == "done":
                    return message.fields
        raise InternalError(f"rollout engine: {kind} was not answered")

    def converse(
        self, kind: str, fields: Mapping[str, Any], arrays: Sequence[Array] = ()
    ) -> Generator[Message, None, None]:
        """Every answer to a call, the last one `done`. Closing the iterator before that ends the call there too.

        Raises the error the engine answers with, and `RolloutEngineError` when it is gone, or neither reads nor says
        anything for too long.
        """
        with self._turn:
            self._last_call += 1
            call, is_sent, is_over = self._last_call, False, False
            try:
                self._send(Message(kind=kind, call=call, fields=fields, arrays=tuple(arrays)))
                is_sent = True
                while not is_over:
                    message = self._next(call)
                    is_over = message.kind in ("done", "failed")
                    if message.kind == "failed":
                        raise from_code(message.fields["code"], message.fields["message"])
                    if message.kind != "alive":
                        yield message
            finally:
                if not is_sent:
                    # What would be sent next were the rest of this message to it.
                    self._kill()
                elif not is_over and self._process.poll() is None:
                    self._stop(call)

    def close(self) -> None:
        """Ends the process; killed when it takes its time."""
        if self._process.poll() is None:
            self._stop(self._last_call, also_close=True)
            try:
                self._process.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:
                self._kill()
        if self._reader.is_alive():
            # Its number may be another file's as soon as it is closed, so nobody may be about to read from it.
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._reader.join()
        self._channel.close()
        self._socket.close()

    def _read(self) -> None:
        try:
            while True:
                self._answers.put(self._channel.receive())
        except (EOFError, OSError, ValueError):
            self._answers.put(None)

    def _send(self, message: Message) -> None:
        try:
            self._limit_sending(self._patience_s)
            self._channel.send(message)
        except BlockingIOError:
            self._kill()
            raise RolloutEngineError(
                f"rollout engine: it read nothing for {self._patience_s:g} s, so it was ended; {self._advice()}"
            ) from None
        except OSError:
            raise self._is_gone() from None

    def _stop(self, call: int, *, also_close: bool = False) -> None:
        try:
            self._limit_sending(_CLOSE_S)
            self._channel.send(Message(kind="stop", call=call), turn_s=_CLOSE_S)
            if also_close:
                self._channel.send(Message(kind="close", call=0), turn_s=_CLOSE_S)
        except BlockingIOError:
            self._kill()
        except OSError:
            pass

    def _limit_sending(self, limit_s: float) -> None:
        """Has a write raise BlockingIOError that gets nothing off for so long.

        The kernel counts anew after a write of which it took a part, so a message may take twice as long to fail.
        """
        seconds, rest = divmod(min(limit_s, _LONGEST_S), 1)
        # All zero would be no limit.
        option = struct.pack("ll", int(seconds), int(rest * 1e6) or (not seconds))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, option)

    def _kill(self) -> int:
        """Also a stopped process; its exit code."""
        self._process.kill()
        return self._process.wait()

    def _next(self, call: int) -> Message:
        """The next answer to this call; what was still under way of a former one is passed over."""
        while True:
            try:
                message = self._answers.get(timeout=self._patience_s)
            except queue.Empty:
                self._kill()
                raise RolloutEngineError(
                    f"rollout engine: no sign of life for {self._patience_s:g} s, so it was ended; {self._advice()}"
                ) from None
            if message is None:
                self._answers.put(None)
                raise self._is_gone()
            if message.call == call:
                return message

    def _is_gone(self) -> RolloutEngineError:
        try:
            code = self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            code = self._kill()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return RolloutEngineError(f"rollout engine: its process {self.pid} is gone ({how}); {self._advice()}")

    def _advice(self) -> str:
        return f"{self._log} may say why; use --resume"
