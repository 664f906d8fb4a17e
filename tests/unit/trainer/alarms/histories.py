"""Histories for the alarms' tests: a healthy run as it was measured, and made-up ones in which one thing goes wrong."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from services.trainer.alarms.history import History

HEALTHY = Path(__file__).with_name("healthy_run.jsonl")
EDGES = [0.0, 256.0, 1024.0, 4096.0]


def healthy_records() -> list[dict[str, Any]]:
    """The metrics that rules read, of a run of the bundled student and teacher that learned (see the demo)."""
    return [json.loads(line) for line in HEALTHY.read_text(encoding="utf-8").splitlines()]


def history(num_steps: int, **columns: Callable[[int], Any] | float) -> History:
    """Steps from 1; a column `distill__overlap_ratio` is that metric, constant or by step."""
    return History(
        {
            "step": step,
            **{
                name.replace("__", "/"): column(step) if callable(column) else column
                for name, column in columns.items()
            },
        }
        for step in range(1, num_steps + 1)
    )


def with_entropies(records: History, entropies: Callable[[int], Sequence[float | None]], count: float = 500.0) -> None:
    """Adds student entropies per bucket of `EDGES`, each over `count` positions; None is an empty bucket."""
    key = "distill/entropy_student/by_position"
    for record in records.records:
        values = list(entropies(record["step"]))
        counts = [0.0 if value is None else count for value in values]
        record |= {"distill/position_edges": EDGES, key: values, f"{key}/count": counts}  # type: ignore[misc]
