"""Reward AUROC (section 6.2 of the paper): does the teacher's mean reward tell right rollouts from wrong ones?

r-bar(y) = mean over the positions of y of log q - log p at the sampled tokens. AUROC = P(r-bar of a right rollout >
r-bar of a wrong one), ties 1/2, absent if one class is empty. The paper's failing teacher scores as well as its working
one, so no success follows from it; what it shows is that a reward can be informative and yet not be exploitable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from services.trainer.diagnostics.outcomes import auroc
from services.trainer.evaluation.estimates import Estimate, means_over_rollouts, resampled_counts, tails
from services.trainer.evaluation.results import plain_table

NO_EVIDENCE = (
    "AUROC is no evidence that distillation will succeed: in the paper (6.2) the failing teacher reaches 0.75 and the "
    "working one 0.73"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """One teacher's rewards of the same rollouts; every interval resamples problems."""

    teacher: str
    fingerprint: str
    auroc: Estimate | None
    """None where every rollout is right, or every one wrong."""
    mean_correct: Estimate | None
    """Mean of r-bar over right rollouts; None where there are none."""
    mean_incorrect: Estimate | None
    rewards: tuple[float, ...]
    """r-bar of each rollout, in the order of problems and samples."""


def judge_rewards(
    teacher: str,
    fingerprint: str,
    rewards: Sequence[float],
    is_correct: Sequence[bool],
    problems: Sequence[int],
    *,
    seed: int = 0,
) -> RewardResult:
    """Rewards, verdicts and problem of each rollout, in one order."""
    rewards_R, correct_R, problem_R = np.asarray(rewards), np.asarray(is_correct, np.bool_), np.asarray(problems)

    def mean(chosen_R: NDArray[np.bool_]) -> Estimate | None:
        if not chosen_R.any():
            return None
        return means_over_rollouts(rewards_R[chosen_R, None], problem_R[chosen_R].tolist(), seed=seed)[0]

    return RewardResult(
        teacher=teacher,
        fingerprint=fingerprint,
        auroc=auroc_over_problems(rewards, is_correct, problems, seed=seed),
        mean_correct=mean(correct_R),
        mean_incorrect=mean(~correct_R),
        rewards=tuple(float(reward) for reward in rewards),
    )


def auroc_over_problems(
    rewards: Sequence[float], is_correct: Sequence[bool], problems: Sequence[int], *, seed: int = 0
) -> Estimate | None:
    """AUROC with an interval that resamples problems; resamples without a rollout of either class are left out."""
    value = auroc(rewards, is_correct)
    if value is None:
        return None
    correct_R = np.asarray(is_correct, np.bool_)
    _, place_R = np.unique(np.asarray(problems), return_inverse=True)
    wins_PP = _wins(np.asarray(rewards, np.float64), correct_R, place_R)
    num_problems = len(wins_PP)
    right_P = np.bincount(place_R[correct_R], minlength=num_problems).astype(np.float64)
    wrong_P = np.bincount(place_R[~correct_R], minlength=num_problems).astype(np.float64)
    counts_BP = resampled_counts(num_problems, seed)
    pairs_B = (counts_BP @ right_P) * (counts_BP @ wrong_P)
    has_both_B = pairs_B > 0
    wins_B = ((counts_BP @ wins_PP) * counts_BP).sum(axis=1)
    low, high = np.quantile(wins_B[has_both_B] / pairs_B[has_both_B], tails())
    return Estimate(value=value, low=float(low), high=float(high))


def _wins(
    rewards_R: NDArray[np.float64], correct_R: NDArray[np.bool_], place_R: NDArray[np.intp]
) -> NDArray[np.float64]:
    """[P, P] pairs of a right rollout of one problem and a wrong one of another that are in order; ties count 1/2."""
    num_problems = int(place_R.max()) + 1
    wins_PP = np.zeros((num_problems, num_problems))
    right, right_place = rewards_R[correct_R], place_R[correct_R]
    for problem in np.unique(place_R[~correct_R]):
        wrong = np.sort(rewards_R[~correct_R & (place_R == problem)])
        below = (np.searchsorted(wrong, right, "left") + np.searchsorted(wrong, right, "right")) / 2
        wins_PP[:, problem] = np.bincount(right_place, weights=below, minlength=num_problems)
    return wins_PP


def reward_table(results: Sequence[RewardResult], num_correct: int, num_incorrect: int, title: str) -> Table:
    """Fits a terminal of 80 columns."""
    table = plain_table(title, "teacher", ("right", "wrong", "r-bar right", "r-bar wrong", "AUROC", "95 %"))
    for one in results:
        found = ("absent", "") if one.auroc is None else (
            f"{one.auroc.value:.3f}", f"{one.auroc.low:.3f} {one.auroc.high:.3f}"
        )  # fmt: skip
        means = ("absent" if mean is None else f"{mean.value:+.4f}" for mean in (one.mean_correct, one.mean_incorrect))
        table.add_row(one.teacher, str(num_correct), str(num_incorrect), *means, *found)
    return table
