"""How a benchmark ends: a table for people, then one line of JSON for programs."""

import json
import sys
from collections.abc import Mapping, Sequence


def say(text: str) -> None:
    """A line of progress, on standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def show(header: Sequence[str], rows: Sequence[Sequence[object]], result: Mapping[str, object]) -> None:
    """Prints the rows in columns and the result as the last line."""
    table = [header, *[[_text(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(f"{line.rstrip()}\n")
    sys.stdout.write(f"{json.dumps(result)}\n")
    sys.stdout.flush()


def _text(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
