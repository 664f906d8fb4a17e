"""The student's log-probs at a few ids per position, with gradient and the full normaliser, in bounded memory.

T rows, H hidden size, V rows of the head, K ids. Each chunk of rows is recomputed on the way back, so that at most one
[row_chunk, V] block of logits is alive at any time, forwards or backwards.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd.errors import InvalidRequestError
from opd.ops.head import OutputHead, row_slices, tempered_logits
from opd.ops.rows import DEFAULT_ROW_CHUNK, logprobs_at


def support_logprobs(
    hidden_TH: Tensor,
    head: OutputHead,
    ids_TK: Tensor,
    *,
    num_defined_ids: int,
    temperature: float = 1.0,
    row_chunk: int = DEFAULT_ROW_CHUNK,
) -> Tensor:
    """Log-probs [T, K] at `ids_TK`, normalised over all defined ids, NaN at `PAD_ID`; fp32 or better.

    Give the sampled token as one more column to have its log-prob from the same pass. The gradient with respect to a
    logit is (1[v = id] - softmax(v)) / temperature. Raises `InvalidRequestError` if rows or settings do not fit.
    """
    if ids_TK.shape[0] != hidden_TH.shape[0]:
        raise InvalidRequestError(f"ids_TK has {ids_TK.shape[0]} rows for {hidden_TH.shape[0]} hidden rows")
    if not 1 <= num_defined_ids <= head.num_rows:
        raise InvalidRequestError(f"num_defined_ids={num_defined_ids} is outside 1..{head.num_rows} head rows")
    if not temperature > 0:
        raise InvalidRequestError(f"temperature={temperature} must be positive; 1.0 leaves logits as they are")
    chunk = partial(_chunk_logprobs, head, temperature, num_defined_ids)
    parts = [
        checkpoint(chunk, hidden_TH[rows], ids_TK[rows], use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else chunk(hidden_TH[rows], ids_TK[rows])
        for rows in row_slices(hidden_TH.shape[0], row_chunk)
    ]
    return torch.cat(parts)


def _chunk_logprobs(
    head: OutputHead, temperature: float, num_defined_ids: int, hidden_CH: Tensor, ids_CK: Tensor
) -> Tensor:
    tempered_CV = tempered_logits(head.logits(hidden_CH), temperature, num_defined_ids)
    return logprobs_at(tempered_CV, tempered_CV.logsumexp(dim=-1), ids_CK)
