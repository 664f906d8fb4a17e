"""`opd eval` as processes: one of them killed in the middle ends with the numbers of one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
NUM_RESPONSES = 4 * 6


def start(folder: Path) -> "subprocess.Popen[str]":
    """Few slots, so that responses end one after the other and a kill finds the work half done."""
    command = [
        sys.executable, "-m", "services.cli", "eval", "testbed/models/student-base",
        "--data", "testbed/data/heldout.jsonl", "--max-problems", "4", "--num-samples", "6",
        "--max-response-tokens", "160", "--max-slots", "4", "--device", "cpu", "--seed", "3",
        "--cache", str(folder / "cache"), "--output", str(folder / "result.json"),
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: "subprocess.Popen[str]", folder: Path) -> Any:
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert "avg@6" in output and "student-base" in output
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def num_kept(folder: Path) -> int:
    files = list((folder / "cache").glob("*.jsonl"))
    return sum(file.read_bytes().count(b"\n") - 1 for file in files)


@pytest.mark.timeout(900)
def test_a_killed_evaluation_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    undisturbed = start(alone)
    process = start(killed)
    deadline = time.monotonic() + 300
    while num_kept(killed) < NUM_RESPONSES // 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 0 < num_kept(killed) < NUM_RESPONSES
    assert not (killed / "result.json").exists()
    kept = num_kept(killed)
    again = start(killed)
    assert finish(again, killed) == finish(undisturbed, alone)
    assert kept < num_kept(killed) == NUM_RESPONSES
