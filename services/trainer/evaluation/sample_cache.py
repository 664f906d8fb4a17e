"""Graded samples on disk, so that an evaluation that was interrupted goes on and one that was made is not repeated.

One JSONL file per (model fingerprint, prompts, sampling): a first line that says what it is for, then one line per
sample, written as it is graded. A line torn by a kill is cut off before the file is continued.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from opd.errors import ConfigError
from services.trainer.evaluation.results import GradedSample


class SampleCache:
    """Samples by (problem, sample); None as folder keeps them in memory alone."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self.samples: dict[tuple[int, int], GradedSample] = {}
        self._file: TextIO | None = None
        if folder is None:
            return
        self.path = folder / f"{_digest(identity)}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._read()
            self._file = self.path.open("a", encoding="utf-8")
            if self.path.stat().st_size == 0:
                self._write({"evaluation": dict(identity)})
        except OSError as error:
            raise ConfigError(f"cache folder {folder}: {error.strerror}; give one that can be written") from error

    def add(self, sample: GradedSample) -> None:
        """Keeps one sample, on disk by the time this returns."""
        self.samples[sample.problem, sample.sample] = sample
        if self._file is not None:
            self._write(asdict(sample))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _read(self) -> None:
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.decode("utf-8").splitlines()[1:]:
            sample = GradedSample(**json.loads(line))
            self.samples[sample.problem, sample.sample] = sample


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
