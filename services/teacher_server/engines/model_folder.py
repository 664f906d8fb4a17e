"""A model as files: where it is, whether it is whole and safe to load, and what identifies its weights.

Only safetensors are accepted; a pickled checkpoint can run code while it loads. The weights' hash is taken over the
bytes of the files, so that a copy has the same identity wherever it lies; hashing gigabytes takes seconds, so results
are cached by path, size and modification time.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd.errors import ConfigError
from opd.model_config import identifying_settings

_log = logging.getLogger(__name__)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "consolidated*.pth")
# Keys of config.json that change with the tool that wrote it and not with what the model computes.
_CHUNK_BYTES = 1 << 22


def resolve_folder(model: str) -> Path:
    """The folder of a path, or of a hub name after its download; raises ConfigError in one line."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(f"model={model}: is a file; give the folder that holds config.json and *.safetensors")
    if not _is_hub_name(model):
        raise ConfigError(f"model={model}: no such folder; give a folder of Hugging Face files or a hub name")
    return _download(model)


def check_model(model: str) -> None:
    """What can be said of a local model without loading anything; hub names are looked up when they are loaded."""
    path = Path(model).expanduser()
    if path.is_dir() or path.exists() or not _is_hub_name(model):
        check_folder(resolve_folder(model))


def check_folder(folder: Path) -> list[Path]:
    """The weight files; raises ConfigError when configuration, weights or tokenizer are missing."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model={folder}: has no config.json; give a folder of Hugging Face files")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
        reason = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "no *.safetensors"
        raise ConfigError(f"model={folder}: has {reason}; save it again with safe_serialization=True")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"model={folder}: has no tokenizer; save the tokenizer into the same folder")
    return weights


def model_name(model: str) -> str:
    """What people read: a hub name as it is, a path's last part."""
    return Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model


def hash_weights(files: Sequence[Path], cache_folder: Path | None = None) -> str:
    """Hex digest over names and bytes of the files, read in pieces; `cache_folder` remembers it between starts."""
    key = _cache_key(files)
    cached = cache_folder / f"weights-{key}.json" if cache_folder else None
    if cached is not None and cached.is_file():
        return str(json.loads(cached.read_text(encoding="utf-8"))["sha256"])
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    if cached is not None:
        _remember(cached, digest.hexdigest())
    return digest.hexdigest()


def hash_configuration(folder: Path) -> str:
    """Hex digest of config.json without what the writing tool put there for itself."""
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(identifying_settings(values), sort_keys=True).encode()).hexdigest()


def fingerprint(*parts: str) -> str:
    """The identity of a teacher, 16 hex digits over everything that decides its scores."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_hub_name(model: str) -> bool:
    return _HUB_NAME.fullmatch(model) is not None and not model.startswith(".")


def _cache_key(files: Sequence[Path]) -> str:
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:32]


def _remember(path: Path, sha256: str) -> None:
    """A cache that cannot be written costs seconds at the next start and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps({"sha256": sha256}), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        _log.warning("the weights' hash is not cached in %s: %s", path.parent, error.strerror)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ConfigError(f"model={model}: no such folder, and the hub does not give it ({reason})") from None
