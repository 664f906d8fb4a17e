"""The output head at a few ids per row: what an objective on a support costs when it needs no normaliser.

T rows, H hidden size, V rows of the head, K ids per row, C rows of a chunk, U distinct ids of a chunk. Neither time nor
memory grows with V, but for the weight's gradient, which is dense as everybody's is. Only hidden states and ids are
kept for the way back; gathered weights are gathered again.
"""

from typing import Any

import torch
from torch import Tensor

from opd.errors import InvalidRequestError
from opd.ops.head import OutputHead, require_defined_ids, require_temperature, row_slices
from opd.types import PAD_ID

DEFAULT_SPARSE_CHUNK = 256
"""Rows whose gathered weights [C, K, H] exist at a time."""

_UNIQUE_COST = 64
"""A product with U distinct rows [C, H] x [H, U] is taken while U is at most this many times K: above it, gathering K
rows of the weight for each hidden state is quicker. Measured on one core, chunks of 256 rows, forward and backward: the
two are even at U / K of 32 (H 128, K 8), 65 (H 1,024, K 16) and 130 (H 2,048, K 16; H 1,024, K 64)."""


def support_logits(
    hidden_TH: Tensor,
    head: OutputHead,
    ids_TK: Tensor,
    *,
    num_defined_ids: int,
    temperature: float = 1.0,
    row_chunk: int = DEFAULT_SPARSE_CHUNK,
) -> Tensor:
    """Tempered logits [T, K] at `ids_TK`, fp32 or better; NaN, without a gradient, where there is no id (`PAD_ID`).

    Differentiable in the hidden states, the weight and the bias; equal to `OutputHead.logits` gathered at the ids, to
    rounding. A softmax over a support needs nothing else: any normaliser cancels. `InvalidRequestError` if rows or
    settings do not fit.
    """
    if ids_TK.shape[0] != hidden_TH.shape[0]:
        raise InvalidRequestError(f"ids_TK has {ids_TK.shape[0]} rows for {hidden_TH.shape[0]} hidden rows")
    require_defined_ids(num_defined_ids, head.num_rows)
    require_temperature(temperature)
    present_TK = (ids_TK > PAD_ID) & (ids_TK < num_defined_ids)
    ids_TK = ids_TK.long().masked_fill(~present_TK, 0)
    function: Any = _GatheredProduct
    with torch.autocast(hidden_TH.device.type, enabled=False):
        logits_TK: Tensor = function.apply(hidden_TH, head.weight_VH, ids_TK, row_chunk)
        if head.bias_V is not None:
            logits_TK = logits_TK + head.bias_V.to(logits_TK.dtype)[ids_TK]
        logits_TK = head.scaled_and_capped(logits_TK)
        if temperature != 1.0:
            logits_TK = logits_TK / temperature
    return logits_TK.masked_fill(~present_TK, torch.nan)


class _GatheredProduct(torch.autograd.Function):
    """z[t, k] = h[t] . W[ids[t, k]], accumulated in fp32 (float64 for float64 inputs)."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, ids_TK: Tensor, row_chunk: int) -> Tensor:
        ctx.save_for_backward(hidden_TH, weight_VH, ids_TK)
        ctx.row_chunk = row_chunk
        wide = _accumulation_dtype(hidden_TH, weight_VH)
        product_TK = torch.empty(ids_TK.shape, dtype=wide, device=hidden_TH.device)
        for rows in row_slices(ids_TK.shape[0], row_chunk):
            _product(hidden_TH[rows].to(wide), weight_VH, ids_TK[rows], out_CK=product_TK[rows])
        return product_TK

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TK,) = grad_outputs
        hidden_TH, weight_VH, ids_TK = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_TH = torch.empty_like(hidden_TH) if needs_hidden else None
        grad_VH = torch.zeros_like(weight_VH, dtype=grad_TK.dtype) if needs_weight else None
        for rows in row_slices(ids_TK.shape[0], ctx.row_chunk):
            hidden_CH = hidden_TH[rows].to(grad_TK.dtype)
            found_CH = _backward_of_rows(grad_TK[rows], hidden_CH, weight_VH, ids_TK[rows], grad_VH, needs_hidden)
            if grad_TH is not None and found_CH is not None:
                grad_TH[rows] = found_CH.to(hidden_TH.dtype)
        return grad_TH, None if grad_VH is None else grad_VH.to(weight_VH.dtype), None, None


def _accumulation_dtype(hidden_TH: Tensor, weight_VH: Tensor) -> torch.dtype:
    dtype = torch.promote_types(hidden_TH.dtype, weight_VH.dtype)
    return dtype if dtype == torch.float64 else torch.float32


def _product(hidden_CH: Tensor, weight_VH: Tensor, ids_CK: Tensor, *, out_CK: Tensor) -> None:
    distinct_U, place_CK = torch.unique(ids_CK, return_inverse=True)
    if _is_small(distinct_U, ids_CK):
        every_CU = hidden_CH @ weight_VH[distinct_U].to(hidden_CH.dtype).T
        torch.gather(every_CU, 1, place_CK, out=out_CK)
        return
    weight_CKH = weight_VH[ids_CK].to(hidden_CH.dtype)
    torch.bmm(weight_CKH, hidden_CH.unsqueeze(-1), out=out_CK.unsqueeze(-1))


def _backward_of_rows(
    grad_CK: Tensor,
    hidden_CH: Tensor,
    weight_VH: Tensor,
    ids_CK: Tensor,
    grad_VH: Tensor | None,
    needs_hidden: bool,
) -> Tensor | None:
    """Adds to the weight's gradient where there is one; returns the hidden states' where that is needed."""
    distinct_U, place_CK = torch.unique(ids_CK, return_inverse=True)
    if _is_small(distinct_U, ids_CK):
        # An id that a row holds twice has the sum of both gradients.
        grad_CU = grad_CK.new_zeros(grad_CK.shape[0], distinct_U.numel()).scatter_add_(1, place_CK, grad_CK)
        if grad_VH is not None:
            grad_VH.index_add_(0, distinct_U, grad_CU.T @ hidden_CH)
        return grad_CU @ weight_VH[distinct_U].to(grad_CK.dtype) if needs_hidden else None
    if grad_VH is not None:
        outer_CKH = grad_CK.unsqueeze(-1) * hidden_CH.unsqueeze(1)
        grad_VH.index_add_(0, ids_CK.flatten(), outer_CKH.flatten(0, 1))
    if not needs_hidden:
        return None
    weight_CKH = weight_VH[ids_CK].to(grad_CK.dtype)
    return torch.bmm(grad_CK.unsqueeze(1), weight_CKH).squeeze(1)


def _is_small(distinct_U: Tensor, ids_CK: Tensor) -> bool:
    return distinct_U.numel() <= _UNIQUE_COST * ids_CK.shape[1]
