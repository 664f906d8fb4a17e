"""Checkpoints: a folder any Hugging Face tool can load, with what the trainer needs to go on beside it.

`step-000010/` holds the student (fp32 safetensors, tokenizer, generation configuration) and `trainer/` in it the
optimizer's state, the random number generators and a JSON record. Nothing is pickled. A checkpoint is written into a
temporary folder, flushed to disk and renamed, so what carries its final name is whole; a write that fails leaves
everything that was there before as it was. The record names every file with its digest and has one of its own: a
checkpoint that a disk has damaged since is passed over for the one before.
"""

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.errors import CheckpointError

_log = logging.getLogger(__name__)
_PREFIX = "step-"
_PARTIAL = ".partial-"
_STATE_FILE = "trainer/state.json"
_OPTIMIZER_FILE = "trainer/optimizer.safetensors"
_RANDOM_FILE = "trainer/random.safetensors"
_DIGESTS = "sha256"
_OWN_DIGEST = "record_sha256"
FORMAT = 1
"""Raised when a later version can no longer read what this one wrote."""


class _DamagedError(CheckpointError):
    """What is on disk is not what was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """Where a run stands. Example, after 10 steps: `TrainerState(step=10, seed=0, prompts_digest="9f", config={})`."""

    step: int
    """Completed optimizer steps: also the policy version, and the prompt schedule's position."""
    seed: int
    prompts_digest: str
    """Identity of the prompt list that the schedule's position refers to."""
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    state: TrainerState

    def optimizer_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = _read(self.folder / _OPTIMIZER_FILE, load_file)
        return tensors

    def extra_tensors(self, name: str) -> dict[str, Tensor]:
        """What was saved under `name` beside the student; `CheckpointError` when nothing was."""
        tensors: dict[str, Tensor] = _read(self.folder / _extra_file(name), load_file)
        return tensors

    def restore_random_state(self) -> None:
        """Sets torch's, NumPy's and Python's generators to where they stood."""
        restore_random_state(_read(self.folder / _RANDOM_FILE, load_file))


class CheckpointStore:
    """The checkpoints of one run, oldest first on disk by name."""

    def __init__(self, folder: Path, *, keep_last: int) -> None:
        self._folder = folder
        self._keep_last = keep_last

    def folders(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(path for path in self._folder.glob(f"{_PREFIX}*") if (path / _STATE_FILE).is_file())

    def latest(self) -> Checkpoint | None:
        """The newest one that is as it was written; those passed over are named in a warning.

        None where there never was one, `CheckpointError` where none of them can be used.
        """
        folders = self.folders()
        problem: _DamagedError | None = None
        for folder in reversed(folders):
            try:
                return _verified(folder)
            except _DamagedError as error:
                _log.warning("%s; it is passed over", error.message)
                problem = error
        if problem is not None:
            raise CheckpointError(
                f"none of the {len(folders)} checkpoints in {self._folder} can be used; the oldest: {problem.message}"
            )
        return None

    def save(
        self,
        model: Any,
        tokenizer: Any,
        optimizer_tensors: dict[str, Tensor],
        state: TrainerState,
        extra: Mapping[str, dict[str, Tensor]] | None = None,
        weights: dict[str, Tensor] | None = None,
        write_beside: Callable[[Path], None] | None = None,
    ) -> Path:
        """Writes one and then lets go of the oldest beyond `keep_last`; returns its folder.

        `extra` holds tensors by name beside the student's, see `Checkpoint.extra_tensors`; `weights` are written
        instead of the model's own where those are in shards or have adapters. `write_beside` adds to the folder.
        """
        target = self._folder / _folder_name(state.step)
        partial = self._folder / f"{_PARTIAL}{target.name}"
        try:
            for left_over in self._folder.glob(f"{_PARTIAL}*"):
                shutil.rmtree(left_over, ignore_errors=True)
            files = {_OPTIMIZER_FILE: optimizer_tensors} | _extra_files(extra)
            (partial / _STATE_FILE).parent.mkdir(parents=True)
            if write_beside is not None:
                write_beside(partial)
            _write(partial, model, tokenizer, files, state, weights)
            _replace(partial, target)
        except (OSError, SafetensorError, ValueError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {target}: cannot be written ({_reason(error)}); free or mount space there and use "
                "--resume; earlier checkpoints are untouched"
            ) from error
        self._forget_old(target)
        return target

    def _forget_old(self, newest: Path) -> None:
        # Later ones are what a resumed run has passed over as damaged: they are no reason to let go of a sound one.
        kept = [folder for folder in self.folders() if folder.name <= newest.name]
        for folder in kept[: -self._keep_last]:
            shutil.rmtree(folder, ignore_errors=True)


def random_state() -> dict[str, Tensor]:
    """The generators' states as tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    version, words, gauss = random.getstate()
    assert version == 3
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy.position": torch.tensor([position, has_gauss]),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def restore_random_state(tensors: dict[str, Tensor]) -> None:
    """The way back of `random_state`; states of CUDA devices that are not here are left out."""
    torch.set_rng_state(tensors["torch"])
    position, has_gauss = tensors["numpy.position"].tolist()
    keys = tensors["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, tensors["numpy.gauss"].item()))
    gauss = tensors["python.gauss"].tolist()
    random.setstate((3, tuple(tensors["python.words"].tolist()), gauss[0] if gauss else None))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)


def _write(
    partial: Path,
    model: Any,
    tokenizer: Any,
    files: Mapping[str, dict[str, Tensor]],
    state: TrainerState,
    weights: dict[str, Tensor] | None,
) -> None:
    model.save_pretrained(partial, state_dict=weights)
    _save_tokenizer(tokenizer, partial)
    for file, tensors in files.items():
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial / file)
    save_file(random_state(), partial / _RANDOM_FILE)
    # The record comes last: a folder with a record is whole.
    record = {"format": FORMAT, "step": state.step, "seed": state.seed, "prompts_digest": state.prompts_digest}
    record |= {"config": state.config, _DIGESTS: _digests(partial)}
    record |= {_OWN_DIGEST: _record_digest(record)}
    (partial / _STATE_FILE).write_text(json.dumps(record, indent=2), encoding="utf-8")


def _folder_name(step: int) -> str:
    return f"{_PREFIX}{step:06d}"


def _record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of what a record says, whatever the order and the spaces it is written with."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file there is, by its path within `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _verified(folder: Path) -> Checkpoint:
    """The checkpoint of `folder`; `CheckpointError` naming the first file that is not as it was written."""
    state, digests = _read(folder / _STATE_FILE, _read_state)
    if folder.name != _folder_name(state.step):
        raise _DamagedError(
            f"checkpoint {folder / _STATE_FILE}: is of step {state.step}, which is not the folder's; its content or "
            "the folder's name has been changed"
        )
    for name, written in digests.items():
        if _read(folder / name, _digest) != written:
            raise _DamagedError(f"checkpoint {folder / name}: is not what was written, the disk has damaged it")
    return Checkpoint(folder=folder, state=state)


def _extra_file(name: str) -> str:
    return f"trainer/{name}.safetensors"


def _extra_files(extra: Mapping[str, dict[str, Tensor]] | None) -> dict[str, dict[str, Tensor]]:
    return {_extra_file(name): tensors for name, tensors in (extra or {}).items()}


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # The tokenizers library raises a bare Exception when the disk refuses.
        raise OSError(str(error)) from error


def _replace(partial: Path, target: Path) -> None:
    """Flushes everything, then renames: after a power cut there is the whole folder or none."""
    for path in partial.rglob("*"):
        if path.is_file():
            _flush(path)
    # Only a run that went back behind this step finds one there; the newer content wins.
    replaced = partial.with_name(f"{partial.name}-replaced")
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_state(path: Path) -> tuple[TrainerState, dict[str, str]]:
    """The state, and the digests of the files beside it; a record from before there were digests has none."""
    record = json.loads(path.read_text(encoding="utf-8"))
    own_digest = record.pop(_OWN_DIGEST, None)
    if own_digest is not None and own_digest != _record_digest(record):
        raise _DamagedError(f"checkpoint {path}: is not what was written, the disk has damaged it")
    if record.pop("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path}: is of another format than {FORMAT}; resume with the version it is of"
        )
    digests = record.pop(_DIGESTS, {})
    return TrainerState(**record), digests


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise _DamagedError(f"checkpoint {path}: cannot be read ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
