"""The note a launcher waits for: ports, process and fingerprint of a replica that takes requests."""

import json
import os
from pathlib import Path

from opd.errors import ConfigError


def write_ready_file(path: Path, grpc_port: int, http_port: int, fingerprint: str) -> None:
    """Writes whole or not at all; raises ConfigError when the folder does not take it."""
    note = {"grpc_port": grpc_port, "http_port": http_port, "pid": os.getpid(), "fingerprint": fingerprint}
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(note), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"ready_file={path}: cannot be written ({error.strerror}); give another path") from None
