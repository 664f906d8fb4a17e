"""The step benchmark: honest without a device, and the same code on a CPU in a tiny shape."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TINY = (
    "--device=cpu",
    "--shape=tiny",
    "--prompt=16",
    "--response=48",
    "--rollouts=3",
    "--micro-batch=130",
    "--steps=1",
)


def run(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu_step", *arguments]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=110, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to measure")
def test_without_a_device_it_says_so() -> None:
    result = run()
    assert result["reason"] == "no CUDA device"
    assert [result[name] for name in ("tokens_per_s", "mfu", "peak_bytes")] == [None, None, None]


@pytest.mark.parametrize("objective", ["top_k", "sampled_token"])
def test_a_tiny_shape_runs_on_a_cpu(objective: str) -> None:
    result = run(*TINY, f"--objective={objective}")
    assert result["step_tokens"] == 3 * 64
    assert result["tokens_per_s"] == pytest.approx(result["step_tokens"] / result["step_s"], rel=1e-2)
    assert result["mfu"] is None and result["peak_bytes"] is None
