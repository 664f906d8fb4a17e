"""Vocabulary-sized tensor operations: the only place in `opd` that imports torch.

Everything here works in chunks of rows, so that [T, V] never exists for a whole batch. Logits are fp32 however low the
precision of the weights (float64 stays float64), and rows of the output head that stand for no token are masked out of
every normaliser, ranking and entropy. Teacher engine, rollout sampler and student share this code.
"""

from opd.ops.divergence import FORWARD_KL, REVERSE_KL, row_divergence
from opd.ops.full_vocabulary import FullVocabularyScores, defined_head, full_divergence, full_logprobs
from opd.ops.head import MASKED_LOGIT, OutputHead
from opd.ops.rows import RowStatistics, row_statistics, score_rows, top_k_rows
from opd.ops.sparse_head import support_logits
from opd.ops.support import StudentScores, student_scores, support_logprobs
from opd.ops.topk import top_k_stable

__all__ = [
    "FORWARD_KL",
    "MASKED_LOGIT",
    "REVERSE_KL",
    "FullVocabularyScores",
    "OutputHead",
    "RowStatistics",
    "StudentScores",
    "defined_head",
    "full_divergence",
    "full_logprobs",
    "row_divergence",
    "row_statistics",
    "score_rows",
    "student_scores",
    "support_logits",
    "support_logprobs",
    "top_k_rows",
    "top_k_stable",
]
