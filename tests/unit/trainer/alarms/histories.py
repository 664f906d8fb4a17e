"""Histories for the alarms' tests: three runs as they were measured, and made-up ones in which one thing goes wrong.

The runs are of the bundled student-base, the demo's configuration with 8 prompts a step. The healthy one learned from
teacher-post, the stalled one had a learning rate of 1e-7, the misled one teacher-other, under which it fell apart. They
hold the metrics that rules read, to four digits.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from services.trainer.alarms.history import History

EDGES = [0.0, 256.0, 1024.0, 4096.0]


def measured(name: str) -> list[dict[str, Any]]:
    """The records of `<name>_run.jsonl`."""
    path = Path(__file__).with_name(f"{name}_run.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
