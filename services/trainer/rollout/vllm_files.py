"""Versions of the student's weights as files: written aside, marked, renamed; read whole or not at all.

A version is a Hugging Face folder `version-N` with `complete.json`, which names the version and the size of every
weight file and is written last. A folder without it, a file of another size, or tensors that are not the model's are
refused before the engine touches the weights it has.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from opd.errors import ConfigError, RolloutEngineError, first_line
from services.trainer.distributed.sharding import gathered_weights
from services.trainer.lora import plain_weights

Tensors: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]
"""dtype and shape by name."""
_MARK = "complete.json"
_SHARED_MEMORY = Path("/dev/shm")
_SPARE_BYTES = 1 << 20


class VersionFolder:
    """Where a run writes the versions of its weights; removed when closed."""

    def __init__(self, parent: Path | None) -> None:
        """`ConfigError` where nothing can be written."""
        chosen = parent or (_SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir()))
        try:
            self.path = Path(tempfile.mkdtemp(prefix="opd-rollout-", dir=chosen))
        except OSError as error:
            raise ConfigError(
                f"rollout.vllm.weights_folder={chosen}: {error.strerror}; give a folder that can be written to"
            ) from error

    def write(self, model: Any, version: int, dtype: torch.dtype) -> Path:
        """The folder of a whole version; `RolloutEngineError` when there is no room for it."""
        state = _in_dtype(model, dtype)
        self._check_room(state)
        partial, target = self.path / f".partial-{version}", self.path / f"version-{version}"
        try:
            with _written_by_any_rank(model):
                model.save_pretrained(partial, state_dict=state)
            sizes = {path.name: path.stat().st_size for path in partial.glob("*.safetensors")}
            (partial / _MARK).write_text(json.dumps({"version": version, "sizes": sizes}), encoding="utf-8")
            partial.rename(target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RolloutEngineError(
                f"version {version} cannot be written to {self.path} ({first_line(error)}); see "
                "rollout.vllm.weights_folder"
            ) from error
        return target

    def forget(self, version_folder: Path) -> None:
        """Removes a version that was taken up, or refused."""
        shutil.rmtree(version_folder, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _check_room(self, state: Mapping[str, torch.Tensor]) -> None:
        # By storage, so that tied weights count once.
        sizes = {value.data_ptr(): value.numel() * value.element_size() for value in state.values()}
        needed, free = sum(sizes.values()) + _SPARE_BYTES, shutil.disk_usage(self.path).free
        if needed > free:
            raise RolloutEngineError(
                f"the student's weights take {needed >> 20} MiB and {self.path.parent} has {free >> 20} MiB free; set "
                "rollout.vllm.weights_folder to a folder with room (a container's /dev/shm grows with --shm-size)"
            )


@contextmanager
def _written_by_any_rank(model: Any) -> Iterator[None]:
    """transformers has rank 0 alone write, for ranks that save into one folder; here each has its own."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank


def _in_dtype(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in the engine's dtype, adapters merged in; tied ones stay one tensor, to be written once."""
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    weights = gathered_weights(model)
    own = {value.data_ptr() for value in weights.values()}
    for name, value in plain_weights(model, weights):
        key = (value.data_ptr(), value.shape)
        if key in cast:
            state[name] = cast[key]
            continue
        state[name] = value.detach().to(dtype) if value.is_floating_point() else value.detach()
        # A merged copy is gone with the next, whose place may be the same.
        if key[0] in own:
            cast[key] = state[name]
    return state


def tensors_of(folder: Path) -> Tensors:
    """What a folder's weight files hold, from their headers; `RolloutEngineError` for a file that is not whole."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    part = file.get_slice(name)
                    found[name] = (str(part.get_dtype()), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise RolloutEngineError(f"{path} is not whole ({first_line(error)}); it is not loaded") from error
    return found


def check_version(folder: Path, version: int, expected: Tensors) -> None:
    """`RolloutEngineError` unless the folder is the whole of this version of this model."""
    try:
        mark = json.loads((folder / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RolloutEngineError(f"{folder} is not marked complete ({first_line(error)}); it is not loaded") from error
    if mark["version"] != version:
        raise RolloutEngineError(f"{folder} is version {mark['version']}, not {version}; it is not loaded")
    for name, size in mark["sizes"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise RolloutEngineError(f"{path} has {found} bytes of {size}; it is not loaded")
    tensors = tensors_of(folder)
    wrong = sorted(name for name in expected.keys() | tensors.keys() if tensors.get(name) != expected.get(name))
    if wrong:
        raise RolloutEngineError(f"{folder}: {wrong[0]} is not as the model has it; it is not loaded")
