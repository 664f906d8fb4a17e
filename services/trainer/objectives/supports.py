"""Which ids a top-k loss looks at: the five supports of the paper's ablation (4.2), all from one teacher reply.

T positions, k ids of each top-k set, K support columns: k for `student`, `teacher` and `overlap`, 2k for the others.
S_p and S_q are the student's and the teacher's top-k ids; columns that are not in the support are masked, not moved,
so that every position keeps the same shape. The student's log-probs are asked for afterwards, at just these ids.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.errors import InternalError
from opd.types import PAD_ID
from services.trainer.objectives.config import Support

# The overlap's ids are the teacher's, at which its top-k says all, so it asks for nothing at the student's ids.
NEEDS_CANDIDATES = frozenset({Support.STUDENT, Support.NON_OVERLAP, Support.UNION})
NEEDS_TEACHER_TOP_K = frozenset({Support.TEACHER, Support.OVERLAP, Support.NON_OVERLAP, Support.UNION})


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKScores:
    """One model's top-k ids with what the teacher says of them; `PAD_ID` marks an unused column."""

    ids_Tk: Tensor
    teacher_logprobs_Tk: Tensor | None
    """None for ids at which the support needs no value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportScores:
    """The support and the teacher's log-probs on it."""

    ids_TK: Tensor
    """`PAD_ID` in columns that are not in the support."""
    teacher_logprobs_TK: Tensor

    @property
    def mask_TK(self) -> Tensor:
        return self.ids_TK != PAD_ID


def build_support(support: Support, student: TopKScores, teacher: TopKScores | None) -> SupportScores:
    """Chooses the columns of `support`; `student` holds S_p, `teacher` S_q.

    `student`: S_p. `teacher`: S_q. `overlap`: both, in the teacher's columns. `non_overlap`: exactly one of them.
    `union`: either, an id of both once, in the student's column. Raises `InternalError` when a part the support needs
    is missing.
    """
    if support is Support.STUDENT:
        return _columns(student)
    if teacher is None:
        raise InternalError(f"support={support} needs the teacher's top-k ids, which were not given")
    if support is Support.TEACHER:
        return _columns(teacher)
    in_student_Tk = _is_member(teacher.ids_Tk, student.ids_Tk)
    if support is Support.OVERLAP:
        return _columns(teacher, in_student_Tk)
    teacher_only = _columns(teacher, ~in_student_Tk)
    if support is Support.UNION:
        return _side_by_side(_columns(student), teacher_only)
    return _side_by_side(_columns(student, ~_is_member(student.ids_Tk, teacher.ids_Tk)), teacher_only)


def _is_member(ids_Tk: Tensor, others_Tk: Tensor) -> Tensor:
    return (ids_Tk.unsqueeze(-1) == others_Tk.unsqueeze(-2)).any(dim=-1)


def _columns(scores: TopKScores, mask_Tk: Tensor | None = None) -> SupportScores:
    if scores.teacher_logprobs_Tk is None:
        raise InternalError("a support column needs the teacher's log-probs, which were not given")
    ids_Tk = scores.ids_Tk if mask_Tk is None else scores.ids_Tk.masked_fill(~mask_Tk, PAD_ID)
    return SupportScores(ids_TK=ids_Tk, teacher_logprobs_TK=scores.teacher_logprobs_Tk)


def _side_by_side(left: SupportScores, right: SupportScores) -> SupportScores:
    return SupportScores(
        ids_TK=torch.cat([left.ids_TK, right.ids_TK], dim=-1),
        teacher_logprobs_TK=torch.cat([left.teacher_logprobs_TK, right.teacher_logprobs_TK], dim=-1),
    )
