"""Student against teacher over the whole vocabulary, from hidden states and heads, in bounded memory (eq 4).

T rows, D defined ids, H and G hidden sizes of student and teacher, which need not be equal, K ids. Each chunk of rows
is recomputed on the way back, so that at most one [row_chunk, D] block of logits of each model is alive at any time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd.errors import InvalidRequestError
from opd.ops.divergence import REVERSE_KL, row_divergence
from opd.ops.head import OutputHead, require_defined_ids, require_temperature, row_slices
from opd.ops.rows import DEFAULT_ROW_CHUNK, logprobs_at
from opd.ops.support import rows_entropy


@dataclass(frozen=True, kw_only=True, slots=True)
class FullVocabularyScores:
    """T positions, with gradient in the student's hidden states and head; fp32 or better."""

    divergence_T: Tensor
    """In nats over all defined ids."""
    student_logprobs_TK: Tensor
    """At the ids that were given, NaN at `PAD_ID`."""
    student_entropy_T: Tensor | None = None
    """In nats over all defined ids; None where it was not asked for."""


def full_divergence(
    student_hidden_TH: Tensor,
    student_head: OutputHead,
    teacher_hidden_TG: Tensor,
    teacher_head: OutputHead,
    ids_TK: Tensor,
    *,
    num_defined_ids: int,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    beta: float = REVERSE_KL,
    wants_entropy: bool = False,
    row_chunk: int = DEFAULT_ROW_CHUNK,
) -> FullVocabularyScores:
    """`row_divergence` of student and teacher over all defined ids: value, form and closed-form gradient stand there.

    The gradient with respect to a student logit is divided by the student's temperature. The teacher gets none. Raises
    `InvalidRequestError` if rows or settings do not fit.
    """
    num_rows = student_hidden_TH.shape[0]
    if teacher_hidden_TG.shape[0] != num_rows or ids_TK.shape[0] != num_rows:
        raise InvalidRequestError(
            f"teacher_hidden_TG has {teacher_hidden_TG.shape[0]} rows and ids_TK {ids_TK.shape[0]} for {num_rows} "
            "hidden rows of the student"
        )
    student_head = defined_head(student_head, num_defined_ids)
    teacher_head = defined_head(teacher_head, num_defined_ids)
    require_temperature(student_temperature)
    require_temperature(teacher_temperature)
    temperatures = student_temperature, teacher_temperature
    chunk = partial(_chunk_scores, student_head, teacher_head, *temperatures, beta, wants_entropy)
    parts = [
        checkpoint(chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else chunk(*inputs)
        for rows in row_slices(num_rows, row_chunk)
        for inputs in [(student_hidden_TH[rows], teacher_hidden_TG[rows], ids_TK[rows])]
    ]
    divergences, logprobs, entropies = zip(*parts, strict=True)
    return FullVocabularyScores(
        divergence_T=torch.cat(divergences),
        student_logprobs_TK=torch.cat(logprobs),
        student_entropy_T=torch.cat(entropies) if wants_entropy else None,
    )


def full_logprobs(
    hidden_TH: Tensor,
    head: OutputHead,
    *,
    num_defined_ids: int,
    temperature: float = 1.0,
    row_chunk: int = DEFAULT_ROW_CHUNK,
) -> Iterator[Tensor]:
    """Log-probs over all defined ids, blocks of at most `row_chunk` rows [C, D] in order; fp32 or better.

    With the hidden states and the head of a teacher these are the teacher's own log-probs.
    """
    head = defined_head(head, num_defined_ids)
    require_temperature(temperature)
    for rows in row_slices(hidden_TH.shape[0], row_chunk):
        yield _tempered(as_stored(hidden_TH[rows], head.weight_VH.dtype), head, temperature).log_softmax(dim=-1)


def defined_head(head: OutputHead, num_defined_ids: int) -> OutputHead:
    """The rows of the head that stand for a token; `InvalidRequestError` when it has fewer."""
    require_defined_ids(num_defined_ids, head.num_rows)
    bias_D = None if head.bias_V is None else head.bias_V[:num_defined_ids]
    return replace(head, weight_VH=head.weight_VH[:num_defined_ids], bias_V=bias_D)


def as_stored(hidden_TH: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden states in the head's dtype where that loses nothing, as they were before they were widened to travel.

    So a low-precision product is the very one the teacher computes, and the weight is not widened for it.
    """
    if dtype.itemsize >= hidden_TH.dtype.itemsize:
        return hidden_TH
    narrow_TH = hidden_TH.to(dtype)
    return narrow_TH if torch.equal(narrow_TH.to(hidden_TH.dtype), hidden_TH) else hidden_TH


def _chunk_scores(
    student_head: OutputHead,
    teacher_head: OutputHead,
    student_temperature: float,
    teacher_temperature: float,
    beta: float,
    wants_entropy: bool,
    student_hidden_CH: Tensor,
    teacher_hidden_CG: Tensor,
    ids_CK: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    student_CD = _tempered(student_hidden_CH, student_head, student_temperature)
    with torch.no_grad():
        stored_CG = as_stored(teacher_hidden_CG, teacher_head.weight_VH.dtype)
        teacher_CD = _tempered(stored_CG, teacher_head, teacher_temperature)
    normalizer_C = student_CD.logsumexp(dim=-1)
    entropy_C = rows_entropy(student_CD, normalizer_C) if wants_entropy else None
    return row_divergence(student_CD, teacher_CD, beta), logprobs_at(student_CD, normalizer_C, ids_CK), entropy_C


def _tempered(hidden_CH: Tensor, head: OutputHead, temperature: float) -> Tensor:
    logits_CD = head.logits(hidden_CH)
    return logits_CD / temperature if temperature != 1.0 else logits_CD
