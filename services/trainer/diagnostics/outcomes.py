"""What a whole rollout came to: the teacher's mean reward, and whether it tells right from wrong (6.2)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def teacher_reward(
    student_sampled_logprobs_T: NDArray[np.floating], teacher_sampled_logprobs_T: NDArray[np.floating]
) -> float:
    """Mean over a rollout's positions of log q - log p at the sampled tokens; NaN for a rollout without positions."""
    if not student_sampled_logprobs_T.size:
        return float("nan")
    gaps_T = teacher_sampled_logprobs_T.astype(np.float64) - student_sampled_logprobs_T.astype(np.float64)
    return float(gaps_T.mean())


def auroc(rewards: Sequence[float], is_correct: Sequence[bool]) -> float | None:
    """P(reward of a correct rollout > reward of an incorrect one), ties 1/2; None if either class is empty."""
    values, correct = np.asarray(rewards, np.float64), np.asarray(is_correct, np.bool_)
    num_correct, num_incorrect = int(correct.sum()), int((~correct).sum())
    if not num_correct or not num_incorrect:
        return None
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    # Equal values share the mean of the ranks they take up, which is what counts a tie as one half.
    mean_ranks = np.cumsum(sizes) - (sizes - 1) / 2
    rank_sum = mean_ranks[group][correct].sum()
    return float((rank_sum - num_correct * (num_correct + 1) / 2) / (num_correct * num_incorrect))
