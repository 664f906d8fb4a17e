"""A run's metrics so far, as rules read them: windows of one metric, oldest first, with the steps they cover."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

Record: TypeAlias = Mapping[str, Any]
"""One step: `step`, and under each metric's key a number or a list; NaN and None are missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Consecutive values of one metric. Example: `Window(steps=(3, 4), values=(0.5, 0.7))` has the mean 0.6."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def span(self) -> str:
        """For people: `step 7` or `steps 5-7`."""
        return f"step {self.steps[0]}" if len(self.steps) == 1 else f"steps {self.steps[0]}-{self.steps[-1]}"

    def part(self, begin: int | None, end: int | None) -> "Window":
        """As slicing a list does."""
        return Window(steps=self.steps[begin:end], values=self.values[begin:end])


class History:
    """Records in the order of their steps; `add` appends one."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.records: list[Record] = list(records)

    def add(self, record: Record) -> None:
        self.records.append(record)

    def first(self, key: str, count: int) -> Window | None:
        """The first `count` values of a metric; None while there are fewer."""
        return _window(self.records, key, count)

    def last(self, key: str, count: int) -> Window | None:
        """The last `count` values of a metric; None while there are fewer."""
        found = _window(reversed(self.records), key, count)
        return found and Window(steps=found.steps[::-1], values=found.values[::-1])

    def at(self, steps: Sequence[int]) -> list[Record]:
        """The records of these steps."""
        wanted = set(steps)
        return [record for record in self.records if record["step"] in wanted]


def _window(records: Iterable[Record], key: str, count: int) -> Window | None:
    known = ((record["step"], record[key]) for record in records if is_number(record.get(key)))
    found = list(islice(known, count))
    if len(found) < count:
        return None
    return Window(steps=tuple(step for step, _ in found), values=tuple(float(value) for _, value in found))


def bucket_means(records: Sequence[Record], key: str) -> list[tuple[float, float]]:
    """Per bucket of positions the mean of `key` over the records, and its count; a mean of nothing is NaN."""
    totals: dict[int, float] = {}
    counts: dict[int, float] = {}
    for record in records:
        means, numbers = record.get(f"{key}/by_position") or [], record.get(f"{key}/by_position/count") or []
        for bucket, (mean, number) in enumerate(zip(means, numbers, strict=True)):
            weight = number if is_number(mean) else 0.0
            counts[bucket] = counts.get(bucket, 0.0) + weight
            totals[bucket] = totals.get(bucket, 0.0) + (weight * mean if weight else 0.0)
    return [(totals[bucket] / counts[bucket] if counts[bucket] else math.nan, counts[bucket]) for bucket in counts]


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
