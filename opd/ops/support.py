"""What a loss wants of the student's rows, with gradient and the full normaliser, in bounded memory.

T rows, H hidden size, V rows of the head, K ids, S ids of a support. Each chunk of rows is recomputed on the way back,
so that at most one [row_chunk, V] block of logits is alive at any time, forwards or backwards.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd.errors import InvalidRequestError
from opd.ops.head import MASKED_LOGIT, OutputHead, require_defined_ids, require_temperature, row_slices, tempered_logits
from opd.ops.rows import DEFAULT_ROW_CHUNK, logprobs_at


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentScores:
    """T rows, with gradient in the hidden states and the head; fp32 or better."""

    logprobs_TK: Tensor
    """At the ids that were given, NaN at `PAD_ID`."""
    entropy_T: Tensor | None = None
    """In nats, over all defined ids; None where it was not asked for."""
    outside_logprobs_T: Tensor | None = None
    """Log of the mass outside the support, from the logits there, so that it keeps its digits when it is tiny; about
    `MASKED_LOGIT` where nothing is outside. None without a support."""


def student_scores(
    hidden_TH: Tensor,
    head: OutputHead,
    ids_TK: Tensor,
    *,
    num_defined_ids: int,
    support_ids_TS: Tensor | None = None,
    wants_entropy: bool = False,
    temperature: float = 1.0,
    row_chunk: int = DEFAULT_ROW_CHUNK,
) -> StudentScores:
    """Log-probs at `ids_TK` normalised over all defined ids and, if asked for, entropy and mass outside a support.

    The gradient of a log-prob with respect to a logit is (1[v = id] - softmax(v)) / temperature. `PAD_ID` in a support
    is no id. Raises `InvalidRequestError` if rows or settings do not fit.
    """
    if ids_TK.shape[0] != hidden_TH.shape[0]:
        raise InvalidRequestError(f"ids_TK has {ids_TK.shape[0]} rows for {hidden_TH.shape[0]} hidden rows")
    require_defined_ids(num_defined_ids, head.num_rows)
    require_temperature(temperature)
    chunk = partial(_chunk_scores, head, temperature, num_defined_ids, wants_entropy)
    parts = [
        checkpoint(chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else chunk(*inputs)
        for rows in row_slices(hidden_TH.shape[0], row_chunk)
        for inputs in [(hidden_TH[rows], ids_TK[rows], None if support_ids_TS is None else support_ids_TS[rows])]
    ]
    logprobs, entropies, outside = zip(*parts, strict=True)
    return StudentScores(
        logprobs_TK=torch.cat(logprobs),
        entropy_T=torch.cat(entropies) if wants_entropy else None,
        outside_logprobs_T=None if support_ids_TS is None else torch.cat(outside),
    )


def support_logprobs(
    hidden_TH: Tensor,
    head: OutputHead,
    ids_TK: Tensor,
    *,
    num_defined_ids: int,
    temperature: float = 1.0,
    row_chunk: int = DEFAULT_ROW_CHUNK,
) -> Tensor:
    """The log-probs [T, K] of `student_scores` alone."""
    scores = student_scores(
        hidden_TH, head, ids_TK, num_defined_ids=num_defined_ids, temperature=temperature, row_chunk=row_chunk
    )
    return scores.logprobs_TK


def rows_entropy(logits_CV: Tensor, normalizer_C: Tensor) -> Tensor:
    """[C] in nats, with gradient; a masked logit takes no part. `normalizer_C` is the rows' log sum exp."""
    logprobs_CV = logits_CV - normalizer_C.unsqueeze(-1)
    return -(logprobs_CV.exp() * logprobs_CV).sum(dim=-1)


def _chunk_scores(
    head: OutputHead,
    temperature: float,
    num_defined_ids: int,
    wants_entropy: bool,
    hidden_CH: Tensor,
    ids_CK: Tensor,
    support_ids_CS: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    tempered_CV = tempered_logits(head.logits(hidden_CH), temperature, num_defined_ids)
    normalizer_C = tempered_CV.logsumexp(dim=-1)
    entropy_C = rows_entropy(tempered_CV, normalizer_C) if wants_entropy else None
    outside_C = None
    if support_ids_CS is not None:
        outside_C = _outside(tempered_CV, support_ids_CS).logsumexp(dim=-1) - normalizer_C
    return logprobs_at(tempered_CV, normalizer_C, ids_CK), entropy_C, outside_C


def _outside(tempered_CV: Tensor, support_ids_CS: Tensor) -> Tensor:
    """The logits with those of the support masked."""
    num_rows, num_columns = tempered_CV.shape
    # One column more takes what is no id.
    inside = torch.zeros(num_rows, num_columns + 1, dtype=torch.bool, device=tempered_CV.device)
    ids_CS = support_ids_CS.long()
    inside.scatter_(1, ids_CS.masked_fill((ids_CS < 0) | (ids_CS >= num_columns), num_columns), True)
    return tempered_CV.masked_fill(inside[:, :num_columns], MASKED_LOGIT)
