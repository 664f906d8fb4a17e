"""Nearest neighbours by inner product, and who is a duplicate of whom.

N questions, D dimensions. Rows have length 1, so an inner product is a cosine. Everything goes a block of rows at a
time: memory is that of the embeddings plus one block of similarities, never [N, N].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from services.trainer.recipes.data.extras import import_extra

Vectors: TypeAlias = Any
"""[N, D] with rows of length 1 (or 0 where a question has no known word): dense float32 or a scipy CSR matrix."""
_BLOCK_ROWS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Duplicate:
    """Row `row` is near row `partner` of what it was compared with."""

    row: int
    partner: int
    similarity: float


class NearestIndex(Protocol):
    """Grows, and knows the nearest of what it holds."""

    def add(self, vectors: Vectors) -> None: ...

    def nearest(self, vectors: Vectors) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Cosine and number (by order of adding) of each row's nearest; -inf and -1 while the index is empty."""
        ...


class FaissIndex:
    """Exact inner products over dense rows."""

    def __init__(self, num_dimensions: int) -> None:
        self._index = import_extra("faiss", "faiss-cpu").IndexFlatIP(num_dimensions)

    def add(self, vectors: Vectors) -> None:
        self._index.add(vectors)

    def nearest(self, vectors: Vectors) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self._index.ntotal == 0:
            return _none_near(len(vectors))
        similarities_N1, places_N1 = self._index.search(vectors, 1)
        return similarities_N1[:, 0], places_N1[:, 0]


class SparseIndex:
    """Exact inner products over sparse rows, which FAISS does not take."""

    def __init__(self) -> None:
        self._parts: list[Vectors] = []

    def add(self, vectors: Vectors) -> None:
        self._parts.append(vectors)

    def nearest(self, vectors: Vectors) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if not self._parts:
            return _none_near(vectors.shape[0])
        # Stacked only when rows have come, so that many small additions stay cheap.
        if len(self._parts) > 1:
            sparse = import_extra("scipy.sparse", "scikit-learn")
            self._parts = [sparse.vstack(self._parts, format="csr")]
        similarities_NM = vectors @ self._parts[0].T
        best_N = np.asarray(similarities_NM.max(axis=1).todense(), dtype=np.float32).ravel()
        return best_N, np.asarray(similarities_NM.argmax(axis=1), dtype=np.int64).ravel()


def find_duplicates(
    vectors: Vectors,
    known: Vectors | None,
    *,
    threshold: float,
    within: bool,
    advance: Callable[[int], None] = lambda num_rows: None,
) -> tuple[list[Duplicate], list[Duplicate]]:
    """Rows at or above `threshold` to a row of `known`, and rows that are so to an earlier row that stays.

    A row is looked for in `known` first and is in one of the two lists at most. The second is exact and greedy in
    order: what was dropped drops nobody else. Without `within` it is empty. `advance` gets the rows of each block.
    """
    others = _index_of(vectors)
    if known is not None:
        for block in _blocks(known.shape[0]):
            others.add(known[block])
    kept = _Kept(_index_of(vectors), threshold)
    against: list[Duplicate] = []
    inside: list[Duplicate] = []
    for block in _blocks(vectors.shape[0]):
        rows = np.arange(block.start, block.stop)
        found = _above(rows, *others.nearest(vectors[block]), threshold)
        against += found
        rows = np.setdiff1d(rows, [duplicate.row for duplicate in found])
        if within and rows.size:
            inside += kept.take(rows, vectors[rows])
        advance(block.stop - block.start)
    return against, inside


class _Kept:
    """The rows that stay, in order."""

    def __init__(self, index: NearestIndex, threshold: float) -> None:
        self._index = index
        self._threshold = threshold
        self._rows: list[int] = []

    def take(self, rows: NDArray[np.int64], vectors: Vectors) -> list[Duplicate]:
        """Lets in those of a block that are near to none before them; returns the others."""
        similarities_N, places_N = self._index.nearest(vectors)
        partners_N = np.array([self._rows[place] if place >= 0 else -1 for place in places_N])
        duplicates = _above(rows, similarities_N, partners_N, self._threshold)
        near = {duplicate.row for duplicate in duplicates}
        similarity_NN = _dense(vectors @ vectors.T)
        chosen: list[int] = []
        for place, row in enumerate(rows):
            if int(row) in near:
                continue
            before = similarity_NN[place, chosen]
            if before.size and before.max() >= self._threshold:
                partner = int(rows[chosen[int(before.argmax())]])
                duplicates.append(Duplicate(row=int(row), partner=partner, similarity=float(before.max())))
            else:
                chosen.append(place)
        self._index.add(vectors[chosen])
        self._rows += [int(rows[place]) for place in chosen]
        return sorted(duplicates, key=lambda duplicate: duplicate.row)


def _index_of(vectors: Vectors) -> NearestIndex:
    return SparseIndex() if _is_sparse(vectors) else FaissIndex(vectors.shape[1])


def _above(
    rows: NDArray[np.int64], similarities_N: Sequence[float] | NDArray[np.float32], partners_N: Any, threshold: float
) -> list[Duplicate]:
    return [
        Duplicate(row=int(row), partner=int(partner), similarity=float(similarity))
        for row, similarity, partner in zip(rows, similarities_N, partners_N, strict=True)
        if similarity >= threshold
    ]


def _blocks(num_rows: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK_ROWS, num_rows)) for start in range(0, num_rows, _BLOCK_ROWS)]


def _none_near(num_rows: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return np.full(num_rows, -np.inf, np.float32), np.full(num_rows, -1, np.int64)


def _is_sparse(vectors: Vectors) -> bool:
    return not isinstance(vectors, np.ndarray)


def _dense(matrix: Any) -> NDArray[np.float32]:
    return np.asarray(matrix.todense() if _is_sparse(matrix) else matrix, dtype=np.float32)
