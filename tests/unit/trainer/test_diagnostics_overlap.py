"""Every per-position metric against loops straight from the paper's formulas over full vocabularies, in float64."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from opd.errors import InternalError
from opd.types import PAD_ID
from services.trainer.diagnostics import PositionScores, position_metrics
from services.trainer.diagnostics.overlap import extreme_prob_gap, mass_overlap, overlap_advantage, overlap_of
from services.trainer.objectives import SupportWeight

NUM_POSITIONS, NUM_IDS, K = 40, 14, 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """Full float64 distributions of both models and what the services would say of them in fp32."""

    student_TV: NDArray[np.float64]
    teacher_TV: NDArray[np.float64]
    scores: PositionScores


def _top(logprobs: NDArray[np.float64]) -> list[int]:
    return sorted(range(NUM_IDS), key=lambda v: (-np.float32(logprobs[v]), v))[:K]


def _case(seed: int, spread: float = 2.0) -> Case:
    generator = np.random.default_rng(seed)
    student = generator.normal(size=(NUM_POSITIONS, NUM_IDS)) * spread
    teacher = student * generator.uniform(0, 1, (NUM_POSITIONS, 1)) + generator.normal(size=student.shape) * spread
    # Two positions that share nothing: the teacher likes best exactly what the student likes least.
    teacher[3], teacher[17] = -student[3], -student[17]
    student, teacher = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (student, teacher))
    student_ids = np.array([_top(row) for row in student], np.int32)
    teacher_ids = np.array([_top(row) for row in teacher], np.int32)

    def at(logprobs: NDArray[np.float64], ids: NDArray[np.int32]) -> NDArray[np.float32]:
        return np.take_along_axis(logprobs, ids.astype(np.int64), -1).astype(np.float32)

    scores = PositionScores(
        positions_T=np.arange(NUM_POSITIONS),
        student_topk_ids_Tk=student_ids,
        student_topk_logprobs_Tk=at(student, student_ids),
        teacher_logprobs_at_student_Tk=at(teacher, student_ids),
        teacher_topk_ids_Tk=teacher_ids,
        teacher_topk_logprobs_Tk=at(teacher, teacher_ids),
        student_entropy_T=np.float32(-(np.exp(student) * student).sum(-1)),
        teacher_entropy_T=np.float32(-(np.exp(teacher) * teacher).sum(-1)),
        student_sampled_logprobs_T=at(student, student_ids)[:, 0],
        teacher_sampled_logprobs_T=at(teacher, student_ids)[:, 0],
    )
    return Case(student_TV=student, teacher_TV=teacher, scores=scores)


def _smallest_set(logprobs: NDArray[np.float64], known: list[int]) -> set[int]:
    chosen, mass = set(), 0.0
    for v in known:
        if mass >= 0.99:
            break
        chosen.add(v)
        mass += math.exp(logprobs[v])
    return chosen


def _divergence_on(ids: list[int], student: NDArray[np.float64], teacher: NDArray[np.float64]) -> float:
    student_mass, teacher_mass = (sum(math.exp(row[v]) for v in ids) for row in (student, teacher))
    shares = [(math.exp(student[v]) / student_mass, math.exp(teacher[v]) / teacher_mass) for v in ids]
    return sum(mine * (math.log(mine) - math.log(theirs)) for mine, theirs in shares)


def _by_hand(student: NDArray[np.float64], teacher: NDArray[np.float64]) -> dict[str, float]:
    """One position, from the definitions."""
    student_top, teacher_top = _top(student), _top(teacher)
    common = sorted(set(student_top) & set(teacher_top))
    student_mass = sum(math.exp(student[v]) for v in common)
    teacher_mass = sum(math.exp(teacher[v]) for v in common)
    advantages = [
        math.exp(student[v]) / student_mass
        * ((teacher[v] - math.log(teacher_mass)) - (student[v] - math.log(student_mass)))
        for v in common
    ]  # fmt: skip
    student_set, teacher_set = _smallest_set(student, student_top), _smallest_set(teacher, teacher_top)
    extreme = max(student_top, key=lambda v: abs(math.exp(student[v]) * (teacher[v] - student[v])))
    gap = math.exp(student[extreme]) - math.exp(teacher[extreme])
    student_entropy = -sum(math.exp(x) * x for x in student)
    teacher_entropy = -sum(math.exp(x) * x for x in teacher)
    return {
        "distill/overlap_ratio": len(common) / K,
        "distill/overlap_advantage": sum(advantages) / len(common) if common else math.nan,
        "distill/overlap_advantage_sum": sum(advantages) if common else math.nan,
        "distill/empty_overlap_fraction": float(not common),
        "distill/overlap_mass_student": student_mass,
        "distill/overlap_mass_teacher": teacher_mass,
        "distill/mass99_overlap": len(student_set & teacher_set) / len(student_set | teacher_set),
        "distill/extreme_prob_gap": gap,
        "distill/extreme_prob_gap_abs": abs(gap),
        "distill/entropy_student": student_entropy,
        "distill/entropy_teacher": teacher_entropy,
        "distill/entropy_gap": abs(teacher_entropy - student_entropy),
        "loss/reverse_kl": _divergence_on(student_top, student, teacher),
        "rollout/sampled_reverse_kl": student[student_top[0]] - teacher[student_top[0]],
        "distill/uniform_teacher_fraction": 0.0,
    }


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("seed", range(4))
def test_every_metric_matches_its_formula_at_every_position(seed: int, spread: float) -> None:
    case = _case(seed, spread)
    found = position_metrics(case.scores)
    expected = [_by_hand(student, teacher) for student, teacher in zip(case.student_TV, case.teacher_TV, strict=True)]
    assert set(found) == set(expected[0])
    for name, values in found.items():
        by_hand = [row[name] for row in expected]
        np.testing.assert_allclose(values, by_hand, atol=3e-6, rtol=3e-6, err_msg=name)
    assert np.isnan(found["distill/overlap_advantage"][3]), "a position without an overlap has no advantage"
    assert found["distill/overlap_mass_student"][3] == 0.0
    assert (found["distill/overlap_ratio"] > 0).any()


@pytest.mark.parametrize("weight", list(SupportWeight))
def test_the_extreme_gap_follows_the_weight_of_the_objective(weight: SupportWeight) -> None:
    case = _case(5)
    found = extreme_prob_gap(case.scores.student_topk_logprobs_Tk, case.scores.teacher_logprobs_at_student_Tk, weight)
    for position in range(NUM_POSITIONS):
        student, teacher = case.student_TV[position], case.teacher_TV[position]
        factor = {
            SupportWeight.STUDENT: np.exp(student),
            SupportWeight.TEACHER: np.exp(teacher),
            SupportWeight.UNIFORM: np.ones(NUM_IDS),
        }[weight]
        extreme = max(_top(student), key=lambda v: abs(factor[v] * (teacher[v] - student[v])))
        assert found[position] == pytest.approx(math.exp(student[extreme]) - math.exp(teacher[extreme]), abs=1e-6)


def test_equal_models_agree_on_everything() -> None:
    case = _case(6)
    ids, logprobs = case.scores.student_topk_ids_Tk, case.scores.student_topk_logprobs_Tk
    same = PositionScores(
        positions_T=case.scores.positions_T,
        student_topk_ids_Tk=ids,
        student_topk_logprobs_Tk=logprobs,
        teacher_logprobs_at_student_Tk=logprobs,
        teacher_topk_ids_Tk=ids,
        teacher_topk_logprobs_Tk=logprobs,
    )
    found = position_metrics(same)
    assert (found["distill/overlap_ratio"] == 1).all() and (found["distill/mass99_overlap"] == 1).all()
    assert np.abs(found["distill/overlap_advantage"]).max() < 1e-15
    np.testing.assert_array_equal(found["distill/overlap_mass_student"], found["distill/overlap_mass_teacher"])
    assert not found["distill/extreme_prob_gap"].any()


def test_the_order_within_a_top_k_set_means_nothing() -> None:
    scores = _case(7).scores
    shuffle = np.random.default_rng(0).permutation(K)
    turned = (scores.teacher_topk_ids_Tk[:, shuffle], scores.teacher_topk_logprobs_Tk[:, shuffle])
    plain = (scores.teacher_topk_ids_Tk, scores.teacher_topk_logprobs_Tk)
    for function in (mass_overlap, lambda *a: overlap_advantage(overlap_of(*a))[0]):
        found = function(scores.student_topk_ids_Tk, scores.student_topk_logprobs_Tk, *turned)
        expected = function(scores.student_topk_ids_Tk, scores.student_topk_logprobs_Tk, *plain)
        np.testing.assert_allclose(found, expected, atol=1e-15)


def test_a_single_shared_token_has_advantage_zero_and_padding_is_shared_by_nobody() -> None:
    student_ids = np.array([[5, 1, PAD_ID], [PAD_ID, PAD_ID, 7]], np.int32)
    teacher_ids = np.array([[2, 5, PAD_ID], [8, PAD_ID, PAD_ID]], np.int32)
    logprobs = np.log(np.array([[0.5, 0.3, 0.1], [0.2, 0.2, 0.2]], np.float32))
    found = overlap_of(student_ids, logprobs, teacher_ids, logprobs)
    assert found.mask_Tk.tolist() == [[True, False, False], [False, False, False]]
    mean, total = overlap_advantage(found)
    assert mean[0] == total[0] == 0.0 and np.isnan(mean[1])


def test_very_unlikely_overlaps_keep_their_digits() -> None:
    """Log-probs around -900 have no probability in float64, their ratios do."""
    ids = np.array([[0, 1]], np.int32)
    found = overlap_of(ids, np.array([[-900.0, -901.0]]), ids, np.array([[-901.0, -900.0]]))
    share = 1 / (1 + math.exp(-1))
    assert overlap_advantage(found)[1][0] == pytest.approx(-(share - (1 - share)), rel=1e-12)


def test_no_positions_give_no_values() -> None:
    ids, logprobs = np.zeros((0, 3), np.int32), np.zeros((0, 3), np.float32)
    found = position_metrics(
        PositionScores(
            positions_T=np.zeros(0, np.int64),
            student_topk_ids_Tk=ids,
            student_topk_logprobs_Tk=logprobs,
            teacher_topk_ids_Tk=ids,
            teacher_topk_logprobs_Tk=logprobs,
        )
    )
    assert {values.shape for values in found.values()} == {(0,)}


def test_sets_of_different_k_are_not_compared() -> None:
    ids = np.zeros((2, 3), np.int32)
    with pytest.raises(InternalError, match="cannot be compared"):
        overlap_of(ids, ids.astype(np.float32), ids[:, :2], ids[:, :2].astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_only_rows_that_are_flat_far_beyond_k_are_uniform(dtype: type[np.floating]) -> None:
    num_ids = 151_936
    flat = np.full(4, -math.log(num_ids))
    rows = [flat, flat - np.array([0, 0, 0, 0.5]), np.log([0.25, 0.25, 0.25, 0.25]), np.log([0.7, 0.1, 0.1, 0.1])]
    scores = PositionScores(
        positions_T=np.arange(4),
        teacher_topk_ids_Tk=np.tile(np.arange(4, dtype=np.int32), (4, 1)),
        teacher_topk_logprobs_Tk=np.array(rows).astype(dtype).astype(np.float32),
    )
    assert position_metrics(scores)["distill/uniform_teacher_fraction"].tolist() == [1, 0, 0, 0]
