"""Which ids a top-k loss looks at: the five supports of the paper's ablation (4.2), from one reply and one forward.

T positions, k ids of each top-k set, K support columns: k for `student`, `teacher` and `overlap`, 2k for the others.
S_p and S_q are the student's and the teacher's top-k ids; columns that are not in the support are masked, not moved,
so that every position keeps the same shape.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.errors import InternalError
from opd.types import PAD_ID
from services.trainer.objectives.config import Support

NEEDS_STUDENT_IDS = frozenset({Support.STUDENT, Support.OVERLAP, Support.NON_OVERLAP, Support.UNION})
NEEDS_TEACHER_TOP_K = frozenset({Support.TEACHER, Support.OVERLAP, Support.NON_OVERLAP, Support.UNION})
NEEDS_TEACHER_IDS = frozenset({Support.TEACHER, Support.NON_OVERLAP, Support.UNION})


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKScores:
    """One model's top-k ids with what both models say of them; `PAD_ID` marks an unused column."""

    ids_Tk: Tensor
    student_logprobs_Tk: Tensor | None
    """With gradient. May be None for the teacher's ids where the support is `overlap`, whose ids are the student's."""
    teacher_logprobs_Tk: Tensor | None
    """None for ids at which the support needs no value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportScores:
    """The support and both models' log-probs on it, ready for `LossInputs`."""

    ids_TK: Tensor
    mask_TK: Tensor
    student_logprobs_TK: Tensor
    teacher_logprobs_TK: Tensor


def build_support(support: Support, student: TopKScores | None, teacher: TopKScores | None) -> SupportScores:
    """Chooses the columns of `support`; `student` holds S_p, `teacher` S_q.

    `student`: S_p. `teacher`: S_q. `overlap`: both. `non_overlap`: exactly one of them. `union`: either, an id of both
    once, in the student's column. Raises `InternalError` when a part the support needs is missing.
    """
    if support is Support.STUDENT:
        return _columns(_given(student, support))
    if support is Support.TEACHER:
        return _columns(_given(teacher, support))
    student, teacher = _given(student, support), _given(teacher, support)
    student_in_teacher_Tk = _is_member(student.ids_Tk, teacher.ids_Tk)
    if support is Support.OVERLAP:
        return _columns(student, student_in_teacher_Tk)
    teacher_only = _columns(teacher, ~_is_member(teacher.ids_Tk, student.ids_Tk))
    if support is Support.UNION:
        return _side_by_side(_columns(student), teacher_only)
    return _side_by_side(_columns(student, ~student_in_teacher_Tk), teacher_only)


def _given(scores: TopKScores | None, support: Support) -> TopKScores:
    if scores is None:
        raise InternalError(f"support={support} needs top-k scores that were not given")
    return scores


def _is_member(ids_Tk: Tensor, others_Tk: Tensor) -> Tensor:
    return (ids_Tk.unsqueeze(-1) == others_Tk.unsqueeze(-2)).any(dim=-1)


def _columns(scores: TopKScores, mask_Tk: Tensor | None = None) -> SupportScores:
    used_Tk = scores.ids_Tk != PAD_ID
    if scores.student_logprobs_Tk is None or scores.teacher_logprobs_Tk is None:
        raise InternalError("a support column needs the log-probs of both models; one of them was not given")
    return SupportScores(
        ids_TK=scores.ids_Tk,
        mask_TK=used_Tk if mask_Tk is None else used_Tk & mask_Tk,
        student_logprobs_TK=scores.student_logprobs_Tk,
        teacher_logprobs_TK=scores.teacher_logprobs_Tk,
    )


def _side_by_side(left: SupportScores, right: SupportScores) -> SupportScores:
    return SupportScores(
        ids_TK=torch.cat([left.ids_TK, right.ids_TK], dim=-1),
        mask_TK=torch.cat([left.mask_TK, right.mask_TK], dim=-1),
        student_logprobs_TK=torch.cat([left.student_logprobs_TK, right.student_logprobs_TK], dim=-1),
        teacher_logprobs_TK=torch.cat([left.teacher_logprobs_TK, right.teacher_logprobs_TK], dim=-1),
    )
