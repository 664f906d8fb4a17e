"""Ends of processes, with real ones: signals become an event, a child goes with its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from opd.lifecycle import SAME_REQUEST_S

ROOT = Path(__file__).parents[3]

SHUTDOWN = """
import asyncio, sys
from opd.lifecycle import Shutdown

async def main():
    shutdown = Shutdown()
    shutdown.install(asyncio.get_running_loop())
    print("ready", flush=True)
    await asyncio.wait_for(shutdown.requested.wait(), 20)
    print(shutdown.signal_name, flush=True)
    await asyncio.sleep(20 if "stay" in sys.argv else 0)

asyncio.run(main())
"""

PARENT = """
import os, subprocess, sys
from opd.lifecycle import DIE_WITH_PARENT
code = (
    "import time; from opd.lifecycle import die_with_parent; die_with_parent(); print('up', flush=True); "
    "time.sleep(20)"
)
child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, DIE_WITH_PARENT: str(os.getpid())},
                         stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def start(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def is_alive(process_id: int) -> bool:
    stat = Path(f"/proc/{process_id}/stat")
    return stat.exists() and stat.read_text().split(") ")[1][0] != "Z"


def test_a_signal_becomes_an_event() -> None:
    with start(SHUTDOWN) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "SIGTERM\n"
        assert process.wait(5) == 0


def test_a_second_signal_ends_at_once() -> None:
    with start(SHUTDOWN, "stay") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT\n"
        process.send_signal(signal.SIGINT)
        time.sleep(SAME_REQUEST_S + 0.2)
        assert process.poll() is None, "right after the first it is the same request"
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130


def test_a_child_goes_with_its_parent() -> None:
    with start(PARENT) as parent:
        assert parent.stdout is not None
        child_id = int(parent.stdout.readline())
        assert is_alive(child_id)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(5)
        deadline = time.monotonic() + 5
        while is_alive(child_id) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not is_alive(child_id)
