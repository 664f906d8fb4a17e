"""Near-duplicates against a plain float64 search over all pairs."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse

from services.trainer.recipes.data.nearest import find_duplicates


def unit_rows(seed: int, num_rows: int, num_dimensions: int = 6) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(num_rows, num_dimensions))
    unit: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


def by_all_pairs(
    vectors: NDArray[np.float32], known: NDArray[np.float32], threshold: float, within: bool
) -> tuple[set[int], set[int]]:
    """Row by row, in float64: near to any known row, else near to an earlier row that stayed."""
    rows, others = vectors.astype(np.float64), known.astype(np.float64)
    outside = {row for row in range(len(rows)) if len(others) and (others @ rows[row]).max() >= threshold}
    kept: list[int] = []
    inside: set[int] = set()
    for row in range(len(rows)):
        if row in outside:
            continue
        if within and any(rows[row] @ rows[other] >= threshold for other in kept):
            inside.add(row)
        else:
            kept.append(row)
    return outside, inside


@pytest.mark.parametrize("as_sparse", [False, True])
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("num_known", [0, 40])
def test_the_same_rows_are_found_as_by_all_pairs(as_sparse: bool, within: bool, num_known: int) -> None:
    # More rows than a block holds, so that partners lie in earlier blocks and in a row's own.
    vectors, known = unit_rows(1, 1300), unit_rows(2, num_known)
    expected = by_all_pairs(vectors, known, 0.95, within)
    given = (sparse.csr_matrix(vectors), sparse.csr_matrix(known)) if as_sparse else (vectors, known)
    against, inside = find_duplicates(given[0], given[1] if num_known else None, threshold=0.95, within=within)
    assert ({item.row for item in against}, {item.row for item in inside}) == expected
    assert bool(inside) == within
    assert bool(against) == bool(num_known)


def test_each_duplicate_names_a_partner_of_that_similarity() -> None:
    vectors, known = unit_rows(3, 700), unit_rows(4, 50)
    against, inside = find_duplicates(vectors, known, threshold=0.9, within=True)
    for duplicate in against:
        assert duplicate.similarity == pytest.approx(float(vectors[duplicate.row] @ known[duplicate.partner]), abs=1e-5)
    dropped = {duplicate.row for duplicate in [*against, *inside]}
    for duplicate in inside:
        assert duplicate.partner < duplicate.row
        assert duplicate.partner not in dropped
        similarity = float(vectors[duplicate.row] @ vectors[duplicate.partner])
        assert duplicate.similarity == pytest.approx(similarity, abs=1e-5) and similarity >= 0.9 - 1e-5


def test_what_was_dropped_drops_nobody_else() -> None:
    """b is near a, c is near b but not near a: a and c stay."""
    angles = np.array([0.0, 0.5, 1.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    _, inside = find_duplicates(vectors, None, threshold=0.85, within=True)
    assert [(item.row, item.partner) for item in inside] == [(1, 0)]


def test_the_threshold_itself_is_a_duplicate() -> None:
    vectors = np.array([[1.0, 0.0], [0.5, 0.8660254]], np.float32)
    assert len(find_duplicates(vectors, None, threshold=0.5, within=True)[1]) == 1
    assert find_duplicates(vectors, None, threshold=0.501, within=True)[1] == []


def test_questions_without_a_known_word_are_near_to_none() -> None:
    vectors = sparse.csr_matrix(np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], np.float32))
    assert find_duplicates(vectors, vectors[:1], threshold=0.6, within=True) == ([], [])


def test_every_row_is_counted_as_it_is_done() -> None:
    counts: list[int] = []
    find_duplicates(unit_rows(5, 1300), None, threshold=0.9, within=True, advance=counts.append)
    assert sum(counts) == 1300 and len(counts) > 1
