"""Records of single samples on disk, so that what was interrupted goes on and what was made is not repeated.

One JSONL file per identity (model, prompts, sampling ...): a first line that says what it is for, then one line per
sample, written as it is made. A line torn by a kill is cut off before the file is continued. A file has one writer at
a time, by a lock of the kernel's that a kill ends; another one waits, and finds what the first has made.
"""

import fcntl
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TextIO, TypeVar

from opd.errors import ConfigError

logger = logging.getLogger(__name__)


class SampleRecord(Protocol):
    """What is kept of one sample, named by problem and sample."""

    @property
    def problem(self) -> int: ...
    @property
    def sample(self) -> int: ...
    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        ...

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """The way back; ValueError, TypeError or KeyError for what `as_json` never gave."""
        ...


RecordT = TypeVar("RecordT", bound=SampleRecord)


class SampleCache(Generic[RecordT]):
    """Records by (problem, sample); None as folder keeps them in memory alone."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], record: type[RecordT]) -> None:
        """`ConfigError` for a folder that cannot be written or a file that is broken."""
        self.samples: dict[tuple[int, int], RecordT] = {}
        self._file: TextIO | None = None
        if folder is None:
            return
        self.path = folder / f"{_digest(identity)}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            self._take_over(identity, record)
        except OSError as error:
            raise ConfigError(f"cache folder {folder}: {error.strerror}; give one that can be written") from error

    def add(self, sample: RecordT) -> None:
        """Keeps one sample; with a folder it outlives the process by the time this returns."""
        self.samples[sample.problem, sample.sample] = sample
        if self._file is not None:
            self._write(sample.as_json())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _take_over(self, identity: Mapping[str, Any], record: type[RecordT]) -> None:
        """Becomes the one writer of the file and reads what is there."""
        assert self._file is not None
        try:
            self._lock()
            self._read(record)
            if self.path.stat().st_size == 0:
                self._write({"identity": dict(identity)})
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # What that process samples need not be sampled here.
            logger.warning("another process is writing %s: waiting until it ends", self.path)
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _read(self, record: type[RecordT]) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines()[1:], start=2):
            try:
                sample = record.from_json(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"cache file {self.path}: line {number} is broken; remove the file") from error
            self.samples[sample.problem, sample.sample] = sample


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
