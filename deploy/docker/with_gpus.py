#!/usr/bin/env python3
"""Starts a command with GPUs of its own: `with-gpus [COUNT] COMMAND ...`, COUNT 1 unless told.

`docker-compose up --scale teacher=4` gives every replica the same view of the machine's GPUs, and Docker's `count: 1`
gives each the first one. So replicas agree by locks on files in OPD_GPU_LOCKS, a folder that they share: the command
gets CUDA_VISIBLE_DEVICES, and the kernel drops its locks when it ends, however it ends. Standard library alone.
"""

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def list_gpus() -> list[str]:
    """Indices of the GPUs that this container sees; OPD_GPUS (`0,1`) in place of asking the driver."""
    given = os.environ.get("OPD_GPUS")
    if given:
        return [gpu.strip() for gpu in given.split(",") if gpu.strip()]
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"with-gpus: the driver cannot be asked ({error}); give the container GPUs") from None
    return found.stdout.split()


def take(gpus: Sequence[str], count: int, folder: Path) -> list[str]:
    """Locks `count` of them until this process, or what it becomes, has ended."""
    taken: list[str] = []
    for gpu in gpus:
        if len(taken) == count:
            break
        lock = os.open(folder / f"gpu-{gpu}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        os.set_inheritable(lock, True)
        taken.append(gpu)
    if len(taken) < count:
        raise SystemExit(
            f"with-gpus: {len(taken)} of {len(gpus)} GPUs are free and {count} are wanted; start fewer replicas"
        )
    return taken


def main(arguments: Sequence[str]) -> None:
    """Becomes the command; ends with one line where that cannot be."""
    count = int(arguments[0]) if arguments and arguments[0].isdigit() else 1
    command = arguments[1:] if arguments and arguments[0].isdigit() else arguments
    if not command or count < 1:
        raise SystemExit("with-gpus: usage: with-gpus [COUNT] COMMAND ..., COUNT 1 or more")
    folder = Path(os.environ.get("OPD_GPU_LOCKS", "/gpus"))
    try:
        taken = take(list_gpus(), count, folder)
    except OSError as error:
        raise SystemExit(f"with-gpus: OPD_GPU_LOCKS={folder}: {error.strerror}; mount a folder to write to") from None
    # As nvidia-smi and Docker count; CUDA by itself puts the fastest first.
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
    print(f"with-gpus: {command[0]} has GPU {','.join(taken)}", file=sys.stderr, flush=True)  # noqa: T201
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        raise SystemExit(f"with-gpus: {command[0]}: {error.strerror}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
