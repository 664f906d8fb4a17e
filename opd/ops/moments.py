"""Normaliser, entropy and maxima of wide rows in one visit: the part of scoring that is paid for every column.

C rows, V columns, G groups of columns. Plain tensor operations over all rows would read them from memory once for each
operation; here a few rows at a time go through all operations, so that every visit but the first is to the cache
(measured in docs/decisions/0004-scoring-cost.md). On CUDA one compiled kernel does the same.
"""

import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
GROUP = 64
"""Columns of a group. Measured at 32,000 and 151,936 columns: 32 is slower in finding maxima, 128 in ranking groups."""
_NAMES = ("normalizer_C", "entropy_C", "group_maxima_CG")
_CACHED_ELEMENTS = 65_536
"""Columns times rows of a block, for each thread: a quarter of a megabyte of fp32, which a core's own cache holds."""
NO_COMPILE = "OPD_NO_COMPILE"
"""Environment variable: set, nothing is compiled; everything works without, on CUDA more slowly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMoments:
    """Of C rows; normaliser and entropy are NaN where a logit of the row is NaN or infinite."""

    normalizer_C: Tensor
    """log sum exp."""
    entropy_C: Tensor
    """Nats: log sum exp(x - max) minus the mean of x - max, so a large common offset costs no digits."""
    group_maxima_CG: Tensor
    """Largest value of each group of `GROUP` neighbouring columns; columns that fill no group are in none."""


def row_moments(logits_CV: Tensor) -> RowMoments:
    """All of them in one visit to the logits."""
    if logits_CV.is_cuda:
        return RowMoments(**dict(zip(_NAMES, _on_device(logits_CV), strict=True)))
    num_rows, num_columns = logits_CV.shape
    block_rows = max(1, torch.get_num_threads() * _CACHED_ELEMENTS // num_columns)
    shifted_BV = logits_CV.new_empty(min(block_rows, num_rows), num_columns)
    weights_BV = torch.empty_like(shifted_BV)
    found = RowMoments(
        normalizer_C=logits_CV.new_empty(num_rows),
        entropy_C=logits_CV.new_empty(num_rows),
        group_maxima_CG=logits_CV.new_empty(num_rows, num_columns // GROUP),
    )
    for start in range(0, num_rows, block_rows):
        rows = slice(start, start + block_rows)
        block_BV = logits_CV[rows]
        size = block_BV.shape[0]
        found.group_maxima_CG[rows], top_B1 = _maxima(block_BV)
        torch.sub(block_BV, top_B1, out=shifted_BV[:size])
        torch.exp(shifted_BV[:size], out=weights_BV[:size])
        total_B = weights_BV[:size].sum(dim=-1)
        weighted_B = torch.linalg.vecdot(weights_BV[:size], shifted_BV[:size])
        found.normalizer_C[rows], found.entropy_C[rows] = _from_sums(top_B1.squeeze(-1), total_B, weighted_B)
    return found


def _maxima(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Of groups [B, G] and of rows [B, 1]."""
    num_rows, num_columns = logits_BV.shape
    num_groups = num_columns // GROUP
    maxima_BG = logits_BV[:, : num_groups * GROUP].reshape(num_rows, num_groups, GROUP).amax(dim=-1)
    rest_BR = logits_BV[:, num_groups * GROUP :]
    return maxima_BG, torch.cat([maxima_BG, rest_BR], dim=-1).amax(dim=-1, keepdim=True)


def _from_sums(top_B: Tensor, total_B: Tensor, weighted_B: Tensor) -> tuple[Tensor, Tensor]:
    """A weight of 0 times a shift of minus infinity is NaN: so one infinite logit shows in the weighted sum."""
    log_total_B = total_B.log()
    entropy_B = log_total_B - weighted_B / total_B
    return (top_B + log_total_B).masked_fill(entropy_B.isnan(), torch.nan), entropy_B


def _eager(logits_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    maxima_CG, top_C1 = _maxima(logits_CV)
    shifted_CV = logits_CV - top_C1
    weights_CV = shifted_CV.exp()
    return *_from_sums(top_C1.squeeze(-1), weights_CV.sum(dim=-1), (weights_CV * shifted_CV).sum(dim=-1)), maxima_CG


def _on_device(logits_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # To the compiler one row, or none, is a shape of its own: it would compile again while requests wait.
    compiled = _compiled() if logits_CV.shape[0] > 1 else None
    if compiled is None:
        return _eager(logits_CV)
    try:
        # A batch's last chunk is shorter than the others, and must not cost a compilation of its own.
        torch._dynamo.maybe_mark_dynamic(logits_CV, 0)
        found: tuple[Tensor, Tensor, Tensor] = compiled(logits_CV)
    except torch.OutOfMemoryError:
        # Says nothing of the compiler.
        raise
    except Exception as error:  # whatever a missing or broken compiler raises: the answer does not depend on it
        _log.warning("the normaliser is not compiled (%s); scoring goes on more slowly", type(error).__name__)
        os.environ[NO_COMPILE] = "1"
        _compiled.cache_clear()
        return _eager(logits_CV)
    return found


@cache
def _compiled() -> Any:
    return None if os.environ.get(NO_COMPILE) else torch.compile(_eager, fullgraph=True)
