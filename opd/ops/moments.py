"""Normaliser and entropy of wide rows in one visit: the part of scoring that is paid for every column.

C rows, V columns. Plain tensor operations over all rows would read them from memory once for each operation; here a few
rows at a time go through all operations, so that every visit but the first is to the cache (measured in
docs/decisions/0004-scoring-cost.md). On CUDA one compiled kernel does the same.
"""

import logging
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_CACHED_ELEMENTS = 65_536
"""Columns times rows of a block: a quarter of a megabyte of fp32, which every core's own cache holds."""
NO_COMPILE = "OPD_NO_COMPILE"
"""Environment variable: set, nothing is compiled; everything works without, on CUDA more slowly."""


def row_moments(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Normaliser (log sum exp) and entropy (nats), both [C]; both are NaN where a logit of the row is NaN or infinite.

    An entropy is log sum exp(x - max) minus the mean of x - max, so a large common offset costs no digits.
    """
    if logits_CV.is_cuda:
        return _on_device(logits_CV)
    normalizer_C = logits_CV.new_empty(logits_CV.shape[0])
    entropy_C = torch.empty_like(normalizer_C)
    num_rows = max(1, _CACHED_ELEMENTS // logits_CV.shape[-1])
    shifted_BV = logits_CV.new_empty(num_rows, logits_CV.shape[-1])
    weights_BV = torch.empty_like(shifted_BV)
    for start in range(0, logits_CV.shape[0], num_rows):
        block_BV = logits_CV[start : start + num_rows]
        size = block_BV.shape[0]
        found = _moments(block_BV, shifted_BV[:size], weights_BV[:size])
        normalizer_C[start : start + size], entropy_C[start : start + size] = found
    return normalizer_C, entropy_C


def _moments(logits_BV: Tensor, shifted_BV: Tensor, weights_BV: Tensor) -> tuple[Tensor, Tensor]:
    top_B1 = logits_BV.amax(dim=-1, keepdim=True)
    torch.sub(logits_BV, top_B1, out=shifted_BV)
    torch.exp(shifted_BV, out=weights_BV)
    return _from_sums(top_B1.squeeze(-1), weights_BV.sum(dim=-1), torch.linalg.vecdot(weights_BV, shifted_BV))


def _from_sums(top_B: Tensor, total_B: Tensor, weighted_B: Tensor) -> tuple[Tensor, Tensor]:
    """A weight of 0 times a shift of minus infinity is NaN: so one infinite logit shows in the weighted sum."""
    entropy_B = total_B.log() - weighted_B / total_B
    return (top_B + total_B.log()).masked_fill(entropy_B.isnan(), torch.nan), entropy_B


def _eager(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    top_C1 = logits_CV.amax(dim=-1, keepdim=True)
    shifted_CV = logits_CV - top_C1
    weights_CV = shifted_CV.exp()
    return _from_sums(top_C1.squeeze(-1), weights_CV.sum(dim=-1), (weights_CV * shifted_CV).sum(dim=-1))


def _on_device(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    compiled = _compiled()
    if compiled is None:
        return _eager(logits_CV)
    try:
        # A batch's last chunk is shorter than the others, and must not cost a compilation of its own.
        torch._dynamo.maybe_mark_dynamic(logits_CV, 0)
        found: tuple[Tensor, Tensor] = compiled(logits_CV)
    except Exception as error:  # whatever a missing or broken compiler raises: the answer does not depend on it
        _log.warning("the normaliser is not compiled (%s); scoring goes on more slowly", type(error).__name__)
        os.environ[NO_COMPILE] = "1"
        _compiled.cache_clear()
        return _eager(logits_CV)
    return found


@cache
def _compiled() -> Any:
    return None if os.environ.get(NO_COMPILE) else torch.compile(_eager, fullgraph=True)
