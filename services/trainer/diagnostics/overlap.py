"""How much student and teacher agree on their most likely ids (eq 6, 7, 9, 10 and B.2), per position.

T positions, k ids of both top-k sets, S_p the student's and S_q the teacher's. Every function gives one float64 per
position and NaN where the quantity is not defined there; means over positions are taken elsewhere.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd.errors import InternalError
from opd.types import PAD_ID
from services.trainer.objectives.config import SupportWeight

MASS_SHARE = 0.99
"""Share of a distribution that the id sets of `mass_overlap` hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """The columns of S_p that are in S_q too, with both models' log-probs there (over the full vocabulary)."""

    mask_Tk: NDArray[np.bool_]
    student_logprobs_Tk: NDArray[np.float64]
    """-inf outside the overlap, so that sums of probabilities need no mask."""
    teacher_logprobs_Tk: NDArray[np.float64]
    """Likewise."""


def overlap_of(
    student_ids_Tk: NDArray[np.integer],
    student_logprobs_Tk: NDArray[np.floating],
    teacher_ids_Tk: NDArray[np.integer],
    teacher_logprobs_Tk: NDArray[np.floating],
) -> Overlap:
    """Finds S_p and S_q's common ids; `InternalError` when the two sets are not of one k."""
    if student_ids_Tk.shape != teacher_ids_Tk.shape:
        raise InternalError(
            f"top-k sets of shapes {student_ids_Tk.shape} and {teacher_ids_Tk.shape} cannot be compared"
        )
    mask_Tk, teacher_columns_Tk = _columns_of(student_ids_Tk, teacher_ids_Tk)
    teacher_Tk = np.take_along_axis(teacher_logprobs_Tk.astype(np.float64), teacher_columns_Tk, axis=-1)
    return Overlap(
        mask_Tk=mask_Tk,
        student_logprobs_Tk=np.where(mask_Tk, student_logprobs_Tk.astype(np.float64), -np.inf),
        teacher_logprobs_Tk=np.where(mask_Tk, teacher_Tk, -np.inf),
    )


def _columns_of(
    ids_Tk: NDArray[np.integer], table_Tk: NDArray[np.integer]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Whether each id is in its row of the table, and in which column; by one sorted search over all rows."""
    if not ids_Tk.size:
        return np.zeros(ids_Tk.shape, np.bool_), np.zeros(ids_Tk.shape, np.int64)
    stride = int(max(ids_Tk.max(), table_Tk.max())) + 2
    # A padding id becomes 0 and every other id at least 1, so that rows never run into each other.
    first_T1 = np.arange(len(table_Tk), dtype=np.int64)[:, None] * stride + 1
    order_Tk = np.argsort(table_Tk, axis=-1, kind="stable")
    sorted_keys = (first_T1 + np.take_along_axis(table_Tk, order_Tk, axis=-1)).ravel()
    keys = (first_T1 + ids_Tk).ravel()
    places = np.minimum(np.searchsorted(sorted_keys, keys), sorted_keys.size - 1)
    is_found_Tk = (sorted_keys[places] == keys).reshape(ids_Tk.shape) & (ids_Tk != PAD_ID)
    columns_Tk = order_Tk.ravel()[places].reshape(ids_Tk.shape)
    return is_found_Tk, np.where(is_found_Tk, columns_Tk, 0)


def overlap_ratio(overlap: Overlap) -> NDArray[np.float64]:
    """size(S_p and S_q) / k (eq 6)."""
    ratio_T: NDArray[np.float64] = overlap.mask_Tk.mean(axis=-1, dtype=np.float64)
    return ratio_T


def overlap_mass(overlap: Overlap) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """p- and q-mass on the overlap, 0 where it is empty (eq 9, 10)."""
    return np.exp(overlap.student_logprobs_Tk).sum(axis=-1), np.exp(overlap.teacher_logprobs_Tk).sum(axis=-1)


def overlap_advantage(overlap: Overlap) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (eq 7) and sum over overlap tokens of p (log q - log p), both renormalised on the overlap; NaN if empty.

    The sum is minus the divergence on the overlap: 0 at best, and 0 where a single token overlaps.
    """
    sizes_T = overlap.mask_Tk.sum(axis=-1)
    student_Tk, teacher_Tk = _renormalized(overlap.student_logprobs_Tk), _renormalized(overlap.teacher_logprobs_Tk)
    terms_Tk = np.zeros_like(student_Tk)
    np.multiply(np.exp(student_Tk), teacher_Tk - student_Tk, out=terms_Tk, where=overlap.mask_Tk)
    sums_T = np.where(sizes_T > 0, terms_Tk.sum(axis=-1), np.nan)
    return sums_T / np.maximum(sizes_T, 1), sums_T


def _renormalized(logprobs_Tk: NDArray[np.float64]) -> NDArray[np.float64]:
    """Finite everywhere; outside the overlap the number means nothing."""
    finite_Tk = np.isfinite(logprobs_Tk)
    top_T1 = np.max(logprobs_Tk, axis=-1, keepdims=True, initial=-np.inf)
    top_T1 = np.where(np.isfinite(top_T1), top_T1, 0.0)
    mass_T1 = np.exp(logprobs_Tk - top_T1).sum(axis=-1, keepdims=True)
    log_mass_T1 = top_T1 + np.log(np.where(mass_T1 > 0, mass_T1, 1.0))
    renormalized_Tk: NDArray[np.float64] = np.where(finite_Tk, logprobs_Tk, 0.0) - log_mass_T1
    return renormalized_Tk


def mass_overlap(
    student_ids_Tk: NDArray[np.integer],
    student_logprobs_Tk: NDArray[np.floating],
    teacher_ids_Tk: NDArray[np.integer],
    teacher_logprobs_Tk: NDArray[np.floating],
    share: float = MASS_SHARE,
) -> NDArray[np.float64]:
    """Jaccard index of the smallest id sets that hold `share` of p and of q, each cut at its k known ids."""
    student_Tk, teacher_Tk = _holds_share(student_logprobs_Tk, share), _holds_share(teacher_logprobs_Tk, share)
    is_found_Tk, columns_Tk = _columns_of(student_ids_Tk, teacher_ids_Tk)
    common_T = (student_Tk & is_found_Tk & np.take_along_axis(teacher_Tk, columns_Tk, axis=-1)).sum(axis=-1)
    jaccard_T: NDArray[np.float64] = common_T / (student_Tk.sum(axis=-1) + teacher_Tk.sum(axis=-1) - common_T)
    return jaccard_T


def _holds_share(logprobs_Tk: NDArray[np.floating], share: float) -> NDArray[np.bool_]:
    """Marks, most likely first, the columns before which less than `share` has been gathered."""
    order_Tk = np.argsort(-logprobs_Tk, axis=-1, kind="stable")
    probs_Tk = np.exp(np.take_along_axis(logprobs_Tk.astype(np.float64), order_Tk, axis=-1))
    before_Tk = np.cumsum(probs_Tk, axis=-1) - probs_Tk
    marked_Tk = np.zeros(logprobs_Tk.shape, dtype=np.bool_)
    np.put_along_axis(marked_Tk, order_Tk, before_Tk < share, axis=-1)
    return marked_Tk


def support_reverse_kl(
    student_logprobs_Tk: NDArray[np.floating], teacher_logprobs_Tk: NDArray[np.floating]
) -> NDArray[np.float64]:
    """KL of the student to the teacher, both renormalised on S_p (eq 5): the same for every objective."""
    student_Tk = _renormalized(student_logprobs_Tk.astype(np.float64))
    teacher_Tk = _renormalized(teacher_logprobs_Tk.astype(np.float64))
    divergence_T: NDArray[np.float64] = (np.exp(student_Tk) * (student_Tk - teacher_Tk)).sum(axis=-1)
    return divergence_T


def extreme_prob_gap(
    student_logprobs_Tk: NDArray[np.floating],
    teacher_logprobs_Tk: NDArray[np.floating],
    weight: SupportWeight = SupportWeight.STUDENT,
) -> NDArray[np.float64]:
    """p - q, signed, at the support token with the largest abs(w (log q - log p)), the first of equals (B.2).

    Whether w is renormalised on the support does not matter: a factor per position moves no arg-max.
    """
    student_Tk, teacher_Tk = student_logprobs_Tk.astype(np.float64), teacher_logprobs_Tk.astype(np.float64)
    weights_Tk = {
        SupportWeight.STUDENT: np.exp(student_Tk),
        SupportWeight.TEACHER: np.exp(teacher_Tk),
        SupportWeight.UNIFORM: np.ones_like(student_Tk),
    }[weight]
    extreme_T1 = np.abs(weights_Tk * (teacher_Tk - student_Tk)).argmax(axis=-1)[:, None]
    gaps_Tk = np.exp(student_Tk) - np.exp(teacher_Tk)
    return np.take_along_axis(gaps_Tk, extreme_T1, axis=-1)[:, 0]
