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
    """Log-probs that name their id, so that a column in the wrong place is seen."""
    return TopKScores(ids_Tk=ids, teacher_logprobs_Tk=-(ids.double() + 101))


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
        assert found.teacher_logprobs_TK[row][found.mask_TK[row]].tolist() == [-(v + 101) for v in chosen]


def test_equal_and_disjoint_top_k_sets_give_the_extreme_supports() -> None:
    scores = _scores(STUDENT_IDS), _scores(TEACHER_IDS)
    assert not build_support(Support.NON_OVERLAP, *scores).mask_TK[1].any()
    assert not build_support(Support.OVERLAP, *scores).mask_TK[2].any()
    assert build_support(Support.UNION, *scores).mask_TK[2].all()


def test_overlap_takes_the_students_ids_alone() -> None:
    """So a teacher without candidates can be trained with."""
    ids_only = TopKScores(ids_Tk=STUDENT_IDS, teacher_logprobs_Tk=None)
    assert _chosen(build_support(Support.OVERLAP, ids_only, _scores(TEACHER_IDS)), 0) == [2, 4]


@pytest.mark.parametrize("support", [Support.STUDENT, Support.NON_OVERLAP, Support.UNION])
def test_the_teachers_log_probs_at_the_students_ids_are_asked_for_where_needed(support: Support) -> None:
    without = TopKScores(ids_Tk=STUDENT_IDS, teacher_logprobs_Tk=None)
    with pytest.raises(InternalError, match="needs the teacher's log-probs"):
        build_support(support, without, _scores(TEACHER_IDS))


@pytest.mark.parametrize("support", [s for s in Support if s is not Support.STUDENT])
def test_a_missing_teacher_is_refused(support: Support) -> None:
    with pytest.raises(InternalError, match=f"support={support} needs the teacher's top-k ids"):
        build_support(support, _scores(STUDENT_IDS), None)
