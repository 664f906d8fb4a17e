"""The output while it grows: numbered parts in a folder beside it, each written aside and renamed when it is whole.

Part i holds rows i * n to (i + 1) * n - 1, so that a run that was cut off and resumed writes the same parts as one that
was not. When all are there they become the row groups of the output, in one rename.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opd.errors import CheckpointError, ConfigError
from opd.files import whole_file
from services.score_file.settings import ScoreFileSettings
from services.score_file.table import OutputRow, build_table, schema

_MANIFEST = "manifest.json"
_METADATA_KEY = b"opd_score"


class PartStore:
    """The parts of one output. `open` first; it refuses what another run with other settings has begun."""

    def __init__(self, settings: ScoreFileSettings) -> None:
        self._settings = settings
        self._folder = settings.target.with_name(f"{settings.target.name}.parts")
        # What is to be scored anew stays until the new scores are whole.
        self._replaces_target = settings.overwrite

    def open(self, manifest: dict[str, Any]) -> None:
        """Makes the folder, or finds it as this run would have left it; `ConfigError` for another's."""
        self._manifest = manifest
        try:
            self._check_target()
            if self._settings.overwrite:
                shutil.rmtree(self._folder, ignore_errors=True)
            if self.is_finished:
                self._check(self._finished_manifest(), self._settings.target)
            elif self._manifest_path.exists() and any(self._folder.glob("part-*.parquet")):
                self._check(json.loads(self._manifest_path.read_text(encoding="utf-8")), self._folder)
            else:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._rename(self._manifest_path, lambda path: path.write_text(json.dumps(manifest), encoding="utf-8"))
        except OSError as error:
            raise self._refused(error) from error

    @property
    def is_finished(self) -> bool:
        return self._settings.target.exists() and not self._replaces_target

    def finished_keys(self, part: int) -> list[bytes] | None:
        """Content keys of a whole part's rows; None where it has still to be scored."""
        table = self.finished_columns(part, ["content_key"])
        return None if table is None else table.column("content_key").to_pylist()

    def finished_columns(self, part: int, columns: list[str]) -> pa.Table | None:
        """Columns of a whole part, wherever it lies by now."""
        if self.is_finished:
            with pq.ParquetFile(self._settings.target) as file:
                return file.read_row_group(part, columns=columns) if part < file.num_row_groups else None
        path = self._path(part)
        return pq.read_table(path, columns=columns) if path.exists() else None

    def write(self, part: int, rows: Sequence[OutputRow]) -> None:
        """Adds one whole part."""
        table = build_table(rows, self._settings)
        try:
            self._rename(self._path(part), lambda path: pq.write_table(table, path, compression="zstd"))
        except OSError as error:
            raise self._refused(error) from error

    def join(self, num_parts: int) -> None:
        """Makes the output of all parts and removes them."""
        metadata = {_METADATA_KEY: json.dumps(self._manifest).encode()}

        def write(path: Path) -> None:
            with pq.ParquetWriter(path, schema(self._settings).with_metadata(metadata), compression="zstd") as writer:
                for part in range(num_parts):
                    writer.write_table(pq.read_table(self._path(part)).replace_schema_metadata(metadata))

        try:
            self._rename(self._settings.target, write)
            self._replaces_target = False
            shutil.rmtree(self._folder)
        except OSError as error:
            raise self._refused(error) from error

    def _check_target(self) -> None:
        """Nothing that is not ours is ever written over."""
        target = self._settings.target
        if target.resolve() == self._settings.source.resolve():
            raise ConfigError(f"--out {target}: is the file that is read; choose another")
        if target.exists() and not self._finished_manifest():
            raise ConfigError(f"--out {target}: is there and no output of opd score; choose another")

    @property
    def _manifest_path(self) -> Path:
        return self._folder / _MANIFEST

    def _path(self, part: int) -> Path:
        return self._folder / f"part-{part:06d}.parquet"

    def _finished_manifest(self) -> Any:
        try:
            metadata = pq.read_schema(self._settings.target).metadata or {}
        except (pa.ArrowException, OSError):
            metadata = {}
        return json.loads(metadata.get(_METADATA_KEY, b"{}"))

    def _check(self, found: Any, place: Path) -> None:
        changed = [
            name for name in self._manifest if not isinstance(found, dict) or found.get(name) != self._manifest[name]
        ]
        if changed:
            name = changed[-1]
            before = found.get(name) if isinstance(found, dict) else None
            raise ConfigError(
                f"{place}: was made with {name}={before}, not {self._manifest[name]}; give the same again, or score "
                "everything anew with --overwrite"
            )

    def _rename(self, path: Path, write: Any) -> None:
        with whole_file(path) as partial:
            write(partial)

    def _refused(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self._settings.target}: cannot be written ({error.strerror}); free space or choose another --out"
        )
