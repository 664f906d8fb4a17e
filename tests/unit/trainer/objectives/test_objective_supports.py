"""The five supports against plain sets, with padding, and what is missing named."""

import pytest
import torch

from opd.errors import InternalError
from opd.types import PAD_ID
from services.trainer.objectives import Support
from services.trainer.objectives.supports import SupportScores, TopKScores, build_support

STUDENT_IDS = torch.tensor([[4, 2, 9, 7], [0, 1, 2, 3], [5, 6, 7, 8], [1, 2, PAD_ID, PAD_ID]])
TEACHER_IDS = torch.tensor([[2, 4, 5, 1], [3, 2, 1, 0], [0, 1, 2, 3], [2, 5, PAD_ID, PAD_ID]])


def _scores(ids: torch.Tensor) -> TopKScores:
    """Log-probs that name their id and model, so that a column in the wrong place is seen."""
    student = -(ids.double() + 1)
    return TopKScores(ids_Tk=ids, student_logprobs_Tk=student, teacher_logprobs_Tk=student - 100)


def _sets(support: Support, row: int) -> set[int]:
    student, teacher = set(STUDENT_IDS[row].tolist()) - {PAD_ID}, set(TEACHER_IDS[row].tolist()) - {PAD_ID}
    return {
        Support.STUDENT: student,
        Support.TEACHER: teacher,
        Support.OVERLAP: student.intersection(teacher),
        Support.NON_OVERLAP: student.symmetric_difference(teacher),
        Support.UNION: student.union(teacher),
    }[support]


def _chosen(found: SupportScores, row: int) -> list[int]:
    return found.ids_TK[row][found.mask_TK[row]].tolist()


@pytest.mark.parametrize("support", list(Support))
def test_every_support_is_the_set_it_names_each_id_once(support: Support) -> None:
    found = build_support(support, _scores(STUDENT_IDS), _scores(TEACHER_IDS))
    for row in range(len(STUDENT_IDS)):
        chosen = _chosen(found, row)
        assert sorted(chosen) == sorted(_sets(support, row))
        assert found.student_logprobs_TK[row][found.mask_TK[row]].tolist() == [-(v + 1) for v in chosen]
        assert found.teacher_logprobs_TK[row][found.mask_TK[row]].tolist() == [-(v + 101) for v in chosen]


def test_equal_and_disjoint_top_k_sets_give_the_extreme_supports() -> None:
    scores = _scores(STUDENT_IDS), _scores(TEACHER_IDS)
    assert not build_support(Support.NON_OVERLAP, *scores).mask_TK[1].any()
    assert not build_support(Support.OVERLAP, *scores).mask_TK[2].any()
    assert build_support(Support.UNION, *scores).mask_TK[2].all()


def test_overlap_takes_the_teachers_ids_alone() -> None:
    ids_only = TopKScores(ids_Tk=TEACHER_IDS, student_logprobs_Tk=None, teacher_logprobs_Tk=None)
    found = build_support(Support.OVERLAP, _scores(STUDENT_IDS), ids_only)
    assert _chosen(found, 0) == [4, 2]


@pytest.mark.parametrize("support", [Support.TEACHER, Support.NON_OVERLAP, Support.UNION])
def test_student_log_probs_at_teacher_ids_are_asked_for_where_needed(support: Support) -> None:
    teacher = _scores(TEACHER_IDS)
    without = TopKScores(ids_Tk=TEACHER_IDS, student_logprobs_Tk=None, teacher_logprobs_Tk=teacher.teacher_logprobs_Tk)
    with pytest.raises(InternalError, match="log-probs of both models"):
        build_support(support, _scores(STUDENT_IDS), without)


@pytest.mark.parametrize(("support", "missing"), [(s, "teacher") for s in Support if s is not Support.STUDENT])
def test_a_missing_side_is_refused(support: Support, missing: str) -> None:
    assert missing == "teacher"
    with pytest.raises(InternalError, match=f"support={support} needs"):
        build_support(support, _scores(STUDENT_IDS), None)


def test_the_gradient_goes_to_the_column_it_came_from() -> None:
    student, teacher = (torch.zeros(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = build_support(
        Support.UNION,
        TopKScores(ids_Tk=STUDENT_IDS, student_logprobs_Tk=student, teacher_logprobs_Tk=torch.zeros(4, 4)),
        TopKScores(ids_Tk=TEACHER_IDS, student_logprobs_Tk=teacher, teacher_logprobs_Tk=torch.zeros(4, 4)),
    )
    found.student_logprobs_TK.masked_fill(~found.mask_TK, 0.0).sum().backward()
    assert student.grad is not None and teacher.grad is not None
    assert student.grad.tolist() == (STUDENT_IDS != PAD_ID).double().tolist()
    assert teacher.grad[0].tolist() == [0, 0, 1, 1] and not teacher.grad[1].any()
