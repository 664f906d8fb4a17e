"""Sums with their counts, so that a mean over a step is exact however the step was cut into pieces.

T packed positions, N buckets. A mean of micro-batch means would weight a short micro-batch like a long one. Sums are
joined with `math.fsum`, so that the order of arrival cannot move the result either.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POSITION_EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Absolute response positions; bucket i holds edges[i] <= position < edges[i + 1], the last one everything beyond."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A sum and what to divide it by, e.g. a loss summed over 40 positions: `Mean(total=12.0, count=40)`."""

    total: float
    count: float

    @property
    def value(self) -> float:
        """NaN for a mean of nothing."""
        return self.total / self.count if self.count else math.nan


def mean_of(values: NDArray[np.generic]) -> Mean:
    """The mean of an array of numbers or truth values, summed in float64."""
    return Mean(total=float(np.sum(values, dtype=np.float64)), count=float(values.size))


def joined(means: Iterable[Mean]) -> Mean:
    """One mean over everything the parts saw, the same in any order."""
    parts = list(means)
    return Mean(total=math.fsum(part.total for part in parts), count=math.fsum(part.count for part in parts))


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketMeans:
    """A metric by response position (Figs 13, 23): N buckets that start at `edges`; an empty one has the value NaN."""

    edges: tuple[int, ...]
    means: tuple[Mean, ...]


def bucketed(values_T: NDArray[np.floating], positions_T: NDArray[np.integer], edges: Sequence[int]) -> BucketMeans:
    """Sums and counts per bucket; positions are indices within the response and never below the first edge."""
    buckets_T = np.searchsorted(np.asarray(edges), positions_T, side="right") - 1
    totals_N = np.bincount(buckets_T, weights=values_T.astype(np.float64), minlength=len(edges))
    counts_N = np.bincount(buckets_T, minlength=len(edges))
    means = (Mean(total=float(total), count=float(count)) for total, count in zip(totals_N, counts_N, strict=True))
    return BucketMeans(edges=tuple(edges), means=tuple(means))


def joined_buckets(parts: Sequence[BucketMeans]) -> BucketMeans:
    """All parts must have the same edges."""
    columns = zip(*(part.means for part in parts), strict=True)
    return BucketMeans(edges=parts[0].edges, means=tuple(joined(column) for column in columns))
