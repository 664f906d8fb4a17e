"""Files that are whole or not there, whenever a process is killed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, which takes its name when the context ends without an error."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    partial.replace(path)
