"""What other benchmarks start also answers a person."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("name", "words"), [("students", "num_open"), ("sleeping_replica", "tokens_per_s")])
def test_help_is_answered_and_a_missing_argument_is_named(name: str, words: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    root = Path(__file__).parents[3]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=root, timeout=100, check=True)
    assert words in shown.stdout
    refused = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=100, check=False)
    assert refused.returncode == 2 and words in refused.stderr and "Traceback" not in refused.stderr
