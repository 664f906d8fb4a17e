"""The per-position part of the metrics: what goes in, and one array per metric out.

T packed response positions of any rollouts, k ids of both top-k sets. Student numbers are those of the rollout, at the
sampling temperature; teacher numbers are at the teacher temperature.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd.errors import NonFiniteError
from opd.types import Floats, Ids, Mask, Rollout, Scores
from services.trainer.diagnostics import overlap as formulas
from services.trainer.objectives.config import SupportWeight

_MIN_UNIFORM_IDS = 2
_UNIFORM_NATS = 1e-2
"""Spread below which log-probs count as equal: float16 near log(1/150,000) has steps of 0.008."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionScores:
    """T positions; a field that was not measured is None, and the metrics that need it are then absent."""

    positions_T: NDArray[np.integer]
    """Index within the response."""
    student_topk_ids_Tk: Ids | None = None
    """S_p"""
    student_topk_logprobs_Tk: Floats | None = None
    teacher_logprobs_at_student_Tk: Floats | None = None
    """The teacher's log-probs at S_p: the candidates of the request."""
    teacher_topk_ids_Tk: Ids | None = None
    """S_q"""
    teacher_topk_logprobs_Tk: Floats | None = None
    student_entropy_T: Floats | None = None
    teacher_entropy_T: Floats | None = None
    student_sampled_logprobs_T: Floats | None = None
    """Of the sampled tokens, over the full vocabulary (before top-p)."""
    teacher_sampled_logprobs_T: Floats | None = None


def positions_of(rollout: Rollout, scores: Scores, scored_rows: Mask | None = None) -> PositionScores:
    """The scored positions of one rollout.

    A field that is NaN throughout was not measured; one that is NaN here and there raises `NonFiniteError`. Candidates
    count only when they are the rollout's own top-k ids, column by column.
    """
    rows = np.ones(rollout.response_token_ids.size, np.bool_) if scored_rows is None else scored_rows

    def measured(name: str, values: Floats | None) -> Floats | None:
        return _measured(f"rollout {rollout.rollout_id}: {name}", values, rows)

    has_candidates = (
        scores.candidate_logprobs is not None and scores.candidate_logprobs.shape == rollout.topk_logprobs.shape
    )
    teacher_topk = measured("teacher top-k log-probs", scores.topk_logprobs)
    student_topk = measured("student top-k log-probs", rollout.topk_logprobs)
    return PositionScores(
        positions_T=np.flatnonzero(rows),
        student_topk_ids_Tk=rollout.topk_token_ids[rows] if student_topk is not None else None,
        student_topk_logprobs_Tk=student_topk,
        teacher_logprobs_at_student_Tk=(
            measured("teacher log-probs at the student's ids", scores.candidate_logprobs) if has_candidates else None
        ),
        teacher_topk_ids_Tk=_ids(scores.topk_token_ids, rows) if teacher_topk is not None else None,
        teacher_topk_logprobs_Tk=teacher_topk,
        student_entropy_T=measured("student entropy", rollout.entropy),
        teacher_entropy_T=measured("teacher entropy", scores.entropy),
        student_sampled_logprobs_T=measured("student log-probs of the sampled tokens", rollout.sampled_logprobs),
        teacher_sampled_logprobs_T=measured("teacher log-probs of the sampled tokens", scores.sampled_logprobs),
    )


def _ids(ids: Ids | None, rows: Mask) -> Ids | None:
    return None if ids is None else ids[rows]


def _measured(name: str, values: Floats | None, rows: Mask) -> Floats | None:
    if values is None or not values[rows].size:
        return None
    kept = values[rows]
    missing = ~np.isfinite(kept)
    if not missing.any():
        return kept
    if np.isnan(kept).all():
        return None
    position = int(np.flatnonzero(rows)[np.argwhere(missing)[0][0]])
    raise NonFiniteError(f"{name} at position {position} is {kept[missing][0]} while others are numbers")


def position_metrics(
    scores: PositionScores, weight: SupportWeight = SupportWeight.STUDENT, *, with_costly: bool = True
) -> dict[str, NDArray[np.float64]]:
    """One value per position for every metric that `scores` allows; NaN where it is not defined at that position.

    `weight` is w(v) of the objective in `distill/extreme_prob_gap`, whose support is always S_p, so that runs with
    different supports stay comparable. Costly is whatever compares or sums over the k ids.
    """
    cheap = {**_entropies(scores), **_sampled(scores), **_uniform_rows(scores)}
    return {**cheap, **_overlaps(scores), **_divergences(scores, weight)} if with_costly else cheap


def _entropies(scores: PositionScores) -> dict[str, NDArray[np.float64]]:
    student, teacher = scores.student_entropy_T, scores.teacher_entropy_T
    metrics = {}
    if student is not None:
        metrics["distill/entropy_student"] = student.astype(np.float64)
    if teacher is not None:
        metrics["distill/entropy_teacher"] = teacher.astype(np.float64)
    if student is not None and teacher is not None:
        metrics["distill/entropy_gap"] = np.abs(teacher.astype(np.float64) - student.astype(np.float64))
    return metrics


def _overlaps(scores: PositionScores) -> dict[str, NDArray[np.float64]]:
    student_ids, student_logprobs = scores.student_topk_ids_Tk, scores.student_topk_logprobs_Tk
    teacher_ids, teacher_logprobs = scores.teacher_topk_ids_Tk, scores.teacher_topk_logprobs_Tk
    if student_ids is None or student_logprobs is None or teacher_ids is None or teacher_logprobs is None:
        return {}
    overlap = formulas.overlap_of(student_ids, student_logprobs, teacher_ids, teacher_logprobs)
    advantage_T, advantage_sum_T = formulas.overlap_advantage(overlap)
    student_mass_T, teacher_mass_T = formulas.overlap_mass(overlap)
    return {
        "distill/overlap_ratio": formulas.overlap_ratio(overlap),
        "distill/overlap_advantage": advantage_T,
        "distill/overlap_advantage_sum": advantage_sum_T,
        "distill/empty_overlap_fraction": np.isnan(advantage_T).astype(np.float64),
        "distill/overlap_mass_student": student_mass_T,
        "distill/overlap_mass_teacher": teacher_mass_T,
        "distill/mass99_overlap": formulas.mass_overlap(student_ids, student_logprobs, teacher_ids, teacher_logprobs),
    }


def _divergences(scores: PositionScores, weight: SupportWeight) -> dict[str, NDArray[np.float64]]:
    student, teacher = scores.student_topk_logprobs_Tk, scores.teacher_logprobs_at_student_Tk
    if student is None or teacher is None:
        return {}
    gap_T = formulas.extreme_prob_gap(student, teacher, weight)
    return {
        "loss/reverse_kl": formulas.support_reverse_kl(student, teacher),
        "distill/extreme_prob_gap": gap_T,
        "distill/extreme_prob_gap_abs": np.abs(gap_T),
    }


def _sampled(scores: PositionScores) -> dict[str, NDArray[np.float64]]:
    student, teacher = scores.student_sampled_logprobs_T, scores.teacher_sampled_logprobs_T
    if student is None or teacher is None:
        return {}
    return {"rollout/sampled_reverse_kl": student.astype(np.float64) - teacher.astype(np.float64)}


def _uniform_rows(scores: PositionScores) -> dict[str, NDArray[np.float64]]:
    """1 where the teacher spreads evenly over more than twice its k ids: a broken teacher, hardly ever an opinion."""
    logprobs_Tk = scores.teacher_topk_logprobs_Tk
    if logprobs_Tk is None or logprobs_Tk.shape[-1] < _MIN_UNIFORM_IDS:
        return {}
    wide_Tk = logprobs_Tk.astype(np.float64)
    top_T, bottom_T = wide_Tk.max(axis=-1), wide_Tk.min(axis=-1)
    is_uniform_T = (top_T - bottom_T < _UNIFORM_NATS) & (top_T < -np.log(2 * logprobs_Tk.shape[-1]))
    return {"distill/uniform_teacher_fraction": is_uniform_T.astype(np.float64)}
