"""Symbolic comparison of two answers by math-verify, in a process of its own that can be killed.

Computer algebra has no upper bound: a 9-character answer such as 9^{9^{9}} never returns, and math-verify's own time
limit is a signal that works in the main thread only. So the comparison runs in a child process, where the kernel ends
what takes too long; requests and verdicts are JSON lines, and the next question starts another child. The limit is
processor time, so that a verdict does not depend on how busy the machine is. Run as a script, this file is that child;
it therefore imports nothing of the project, and ends when its stdin is closed.
"""

import atexit
import json
import logging
import resource
import select
import signal
import subprocess
import sys
import threading

_START_TIMEOUT_S = 120.0
_MAX_MEMORY_BYTES = 4 << 30
_READY = "ready"
# For a child that neither answers nor uses its processor time; a very busy machine must not get here.
_WALL_TIMEOUT_S = 120.0

logger = logging.getLogger(__name__)


class SymbolicComparer:
    """Asks the child process; safe to call from any thread, one question at a time."""

    def __init__(self, max_cpu_s: float = 5.0) -> None:
        self._max_cpu_s = max_cpu_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def is_equal(self, extracted: str, answer: str) -> bool:
        """Whether both mean the same; False when that cannot be found out in time."""
        with self._lock:
            reply = self._ask(json.dumps([extracted, answer]))
            if reply is None:
                logger.warning("no verdict within %.1f s of processor time: counted as wrong", self._max_cpu_s)
                logger.debug("the answer without a verdict: %.200r against %.200r", extracted, answer)
                self._stop()
            return reply == "true"

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _ask(self, question: str) -> str | None:
        child = self._child or self._start()
        assert child.stdin is not None
        try:
            child.stdin.write(question + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            return None
        return _read_line(child, _WALL_TIMEOUT_S)

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps this folder off the child's import path, where a file could hide a standard module.
        command = [sys.executable, "-P", __file__, str(self._max_cpu_s)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if _read_line(self._child, _START_TIMEOUT_S) != _READY:
            self._stop()
            raise ImportError("the comparison of answers did not start; install math-verify (the `train` extra)")
        return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()


def _read_line(child: subprocess.Popen[str], timeout_s: float) -> str | None:
    """The child's next line, or None when it does not come in time or the child has ended."""
    assert child.stdout is not None
    readable, _, _ = select.select([child.stdout], [], [], timeout_s)
    return (child.stdout.readline().strip() or None) if readable else None


def serve(max_cpu_s: float) -> None:
    """The child's loop: one JSON pair per line in, `true` or `false` per line out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    def compare(extracted: str, answer: str) -> bool:
        expressions = [parse(f"${text}$", parsing_timeout=None) for text in (answer, extracted)]
        return bool(verify(*expressions, timeout_seconds=None))

    # The first comparison loads much of the algebra, which is not to count against an answer.
    compare("\\frac{1}{2}", "0.5")
    _reply(_READY)
    for line in sys.stdin:
        extracted, answer = json.loads(line)
        # Its signal is left to the kernel, which ends the process also in the midst of compiled code.
        signal.setitimer(signal.ITIMER_PROF, max_cpu_s)
        try:
            verdict = compare(extracted, answer)
        except Exception:  # Whatever the algebra stumbles over, equality was not shown.
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        _reply(json.dumps(verdict))


def _reply(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


comparer = SymbolicComparer()
"""The process-wide comparer; its child starts with the first question and ends with this process."""
atexit.register(comparer.close)

if __name__ == "__main__":
    serve(float(sys.argv[1]))
