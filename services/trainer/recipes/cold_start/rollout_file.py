"""The teacher's responses on disk: one line each, written as it ends, so that sampling goes on after any stop.

A first line says what the file is for; a line torn by a kill is cut off before the file is continued.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from opd.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRollout:
    """One response. Example: ``TeacherRollout(prompt=3, sample=0, token_ids=[7, 1], text="4", is_truncated=False)``."""

    prompt: int
    """Place in the cold-start prompts."""
    sample: int
    token_ids: list[int]
    """As sampled, its EOS included, of the teacher's vocabulary."""
    text: str
    """Without the EOS."""
    is_truncated: bool


class RolloutFile:
    """Rollouts by (prompt, sample)."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Reads what is there; `ConfigError` when the file belongs to other prompts, sampling or teacher."""
        self.rollouts: dict[tuple[int, int], TeacherRollout] = {}
        self._path = path
        self._identity = dict(identity)
        self._file: TextIO | None = None
        if path.is_file():
            self._read()

    def open(self, teacher_fingerprint: str) -> None:
        """Gets ready to add; the fingerprint is that of the weights which are to sample."""
        identity = self._identity | {"teacher_fingerprint": teacher_fingerprint}
        is_new = not self._path.is_file() or self._path.stat().st_size == 0
        if not is_new:
            self._check(self._header(), identity)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{self._path}: {error.strerror}; give a run_dir that can be written") from error
        if is_new:
            self._write({"rollouts": identity})

    def add(self, rollout: TeacherRollout) -> None:
        """Keeps one, on disk by the time this returns."""
        self.rollouts[rollout.prompt, rollout.sample] = rollout
        self._write(asdict(rollout))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def _read(self) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            self._check(self._header(), self._identity)
        if len(whole) < len(content):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.decode("utf-8").split("\n")[1:-1]:
            rollout = TeacherRollout(**json.loads(line))
            self.rollouts[rollout.prompt, rollout.sample] = rollout

    def _header(self) -> dict[str, Any]:
        try:
            with self._path.open(encoding="utf-8") as file:
                header: dict[str, Any] = json.loads(file.readline())["rollouts"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._path}: is no file of rollouts; remove it or use another run_dir") from error
        return header

    def _check(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        changed = sorted(name for name, value in wanted.items() if found.get(name) != value)
        if changed:
            raise ConfigError(
                f"{self._path}: holds rollouts with another {', '.join(changed)}; remove it or use another run_dir"
            )
