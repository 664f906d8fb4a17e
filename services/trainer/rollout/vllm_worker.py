"""The engine's own process: answers the trainer's calls one after the other, and never outlives it.

Started as `python -m services.trainer.rollout.vllm_worker DESCRIPTOR`, the number of an inherited socket. The first
call is `start`; then `sample`, `load` and `transfer` in any order, each answered with `done` or `failed`, `sample` with
a `finished` for each response before. A thread reads: the trainer's end closing ends this process at once, whatever it
is computing, and takes the weights' folder with it.
"""

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np

import opd
from opd.errors import InternalError, OpdError, RolloutEngineError, first_line
from services.trainer.rollout.base import SamplingParams
from services.trainer.rollout.vllm_channel import Channel, Message
from services.trainer.rollout.vllm_sampler import Sampled, SamplerOptions, VllmSampler

_SIGN_OF_LIFE_S = 5.0


class Worker:
    """One trainer's calls."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._calls: SimpleQueue[Message] = SimpleQueue()
        self._postponed: deque[Message] = deque()
        self._sampler: VllmSampler | None = None
        self._weights_root = ""
        self._last_sign_s = 0.0

    def run(self) -> None:
        """Until `close`; or for ever, the reading thread ends the process."""
        threading.Thread(target=self._read, name="read", daemon=True).start()
        while True:
            call = self._postponed.popleft() if self._postponed else self._calls.get()
            if call.kind == "close":
                return
            if call.kind != "stop":
                self._answer(call)

    def _read(self) -> None:
        try:
            while True:
                self._calls.put(self._channel.receive())
        except (EOFError, OSError):
            if self._weights_root:
                shutil.rmtree(self._weights_root, ignore_errors=True)
            os._exit(1)

    def _answer(self, call: Message) -> None:
        try:
            fields = self._do(call)
        except Exception as error:
            traceback.print_exc()
            known = error if isinstance(error, OpdError) else RolloutEngineError(f"vLLM failed: {first_line(error)}")
            self._channel.send(
                Message(kind="failed", call=call.call, fields={"code": known.code, "message": known.message})
            )
        else:
            self._channel.send(Message(kind="done", call=call.call, fields=fields))

    def _do(self, call: Message) -> dict[str, object]:
        match call.kind:
            case "start":
                self._weights_root = call.fields["weights_root"]
                options = call.fields["options"]
                self._sampler = VllmSampler(
                    SamplerOptions(**options | {"eos_token_ids": tuple(options["eos_token_ids"])})
                )
                return {"max_context": self._sampler.max_context, "version": opd.__version__}
            case "sample":
                self._sample(call)
            case "load":
                self._loaded().load(Path(call.fields["folder"]), call.fields["version"])
            case "transfer":
                self._loaded().transfer(call.fields["call"], call.fields["info"], call.fields["version"])
            case _:
                raise InternalError(f"the rollout engine knows no call {call.kind!r}")
        return {"version": self._loaded().version}

    def _loaded(self) -> VllmSampler:
        if self._sampler is None:
            raise InternalError("the rollout engine was called before it was started")
        return self._sampler

    def _sample(self, call: Message) -> None:
        sampler, fields = self._loaded(), call.fields
        tokens, lengths = call.arrays
        found = sampler.sample(
            np.split(tokens, np.cumsum(lengths)[:-1]),
            fields["seeds"],
            SamplingParams(**fields["sampling"]),
            width=fields["width"],
            is_stopped=lambda: self._is_stopped(call.call),
        )
        num_finished = 0
        for sampled in found:
            self._channel.send(_finished(call.call, sampled, sampler.version))
            num_finished += 1
        if num_finished < len(lengths):
            raise RolloutEngineError("rollout engine: it was stopped while it sampled")

    def _is_stopped(self, call: int) -> bool:
        if time.monotonic() - self._last_sign_s > _SIGN_OF_LIFE_S:
            self._last_sign_s = time.monotonic()
            self._channel.send(Message(kind="alive", call=call))
        try:
            message = self._calls.get_nowait()
        except Empty:
            return False
        if message.kind == "stop":
            return message.call == call
        self._postponed.append(message)
        return False


def _finished(call: int, sampled: Sampled, version: int | None) -> Message:
    fields = {"index": sampled.index, "finish_reason": str(sampled.finish_reason), "version": version}
    arrays = (sampled.token_ids_R, sampled.ids_RN, sampled.logprobs_RN)
    return Message(kind="finished", call=call, fields=fields, arrays=arrays)


def main(arguments: Sequence[str]) -> None:
    """The trainer owns signals: Ctrl-C and a stop of the group reach both, and the trainer ends the step first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Worker(Channel(Connection(int(arguments[0])))).run()
    # The weights are the trainer's and nothing else is to be kept; vLLM takes seconds to take itself apart.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
