"""Replicas on one machine agree which GPUs are whose, by real locks of real processes."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "deploy/docker/with_gpus.py"
# Counted as nvidia-smi and Docker do, or the numbers would mean other cards on a machine with several kinds.
SAY = """
import os, sys
assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


def start(folder: Path, *before: str, gpus: str = "0,1,2") -> "subprocess.Popen[str]":
    """A command that says which GPUs it has and stays until it is told to go."""
    command = [sys.executable, str(SCRIPT), *before, sys.executable, "-c", SAY]
    environment = {**os.environ, "OPD_GPU_LOCKS": str(folder), "OPD_GPUS": gpus}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def gpus_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_every_replica_gets_its_own_and_a_dead_ones_are_free_again(tmp_path: Path) -> None:
    first, second = start(tmp_path), start(tmp_path, "2")
    try:
        taken = sorted([gpus_of(first), *gpus_of(second).split(",")])
        assert taken == ["0", "1", "2"]
        late = start(tmp_path)
        _, said = late.communicate(timeout=20)
        assert late.returncode == 1
        assert said == "with-gpus: 0 of 3 GPUs are free and 1 are wanted; start fewer replicas\n"
        second.kill()
        second.wait(10)
        after = start(tmp_path, "2")
        assert len(gpus_of(after).split(",")) == 2
        after.communicate(timeout=20)
        assert after.returncode == 0
    finally:
        for process in (first, second):
            process.kill()
            process.communicate(timeout=20)


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    for folder, before, gpus, words in (
        (tmp_path / "none", [], "0", "No such file or directory; mount a folder"),
        (tmp_path, ["0"], "0", "usage"),
        (tmp_path, ["2"], "0", "1 of 1 GPUs are free and 2 are wanted"),
    ):
        process = start(folder, *before, gpus=gpus)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 1
        assert words in said
        assert said.count("\n") == 1
