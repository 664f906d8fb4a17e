"""The output head: hidden states to fp32 logits, whatever the precision of the weights.

T rows, H hidden size, V rows of the head. bf16 logits alone put a spurious 1e-4 and more into a top-k divergence, so
products of low-precision inputs are accumulated and returned in fp32, also under an autocast of the caller's. Inputs of
different precision are promoted to the higher one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from opd.errors import ConfigError, InvalidRequestError

MASKED_LOGIT = -1e30
"""Stands for a row without a token: its probability is exactly 0 in fp32, and 0 * log(0) stays finite."""

_CAST_ROWS = 8192
"""Rows of a low-precision weight copied to fp32 at a time where the device has no mixed-precision product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputHead:
    """What turns hidden states into logits: cap * tanh(scale * (h W^T + b) / cap); tied or untied weights alike.

    Example: Gemma 2 is `OutputHead(weight_VH=embedding.weight, soft_cap=30.0)`.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ConfigError(f"soft_cap={self.soft_cap} must be positive; leave it unset for a model without one")

    @property
    def num_rows(self) -> int:
        """V, rows without a token included."""
        return self.weight_VH.shape[0]

    def first_rows(self, num_rows: int) -> "OutputHead":
        """The head of the first ids alone, over the same memory: rows without a token are then never computed."""
        if num_rows == self.num_rows:
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:num_rows]
        return replace(self, weight_VH=self.weight_VH[:num_rows], bias_V=bias_V)

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """[T, V] in fp32 (float64 for float64 inputs), differentiable in the hidden states, the weight and the bias."""
        with torch.autocast(hidden_TH.device.type, enabled=False):
            logits_TV = _linear_fp32(hidden_TH, self.weight_VH)
            if self.bias_V is not None:
                logits_TV = logits_TV + self.bias_V.to(logits_TV.dtype)
            return self.scaled_and_capped(logits_TV)

    def scaled_and_capped(self, logits: Tensor) -> Tensor:
        """What the head does to each product by itself, whatever their shape; may return its input."""
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits


def require_defined_ids(num_defined_ids: int, num_rows: int) -> None:
    """`InvalidRequestError` for ids that a head of so many rows does not have."""
    if not 1 <= num_defined_ids <= num_rows:
        raise InvalidRequestError(f"num_defined_ids={num_defined_ids} is outside 1..{num_rows} head rows")


def require_temperature(temperature: float) -> None:
    """`InvalidRequestError` for what logits cannot be divided by."""
    if not temperature > 0:
        raise InvalidRequestError(f"temperature={temperature} must be positive; 1.0 leaves logits as they are")


def tempered_logits(logits_TV: Tensor, temperature: float, num_defined_ids: int) -> Tensor:
    """Divides by the temperature, then masks the rows of the head at and above `num_defined_ids`.

    In this order a tiny temperature cannot turn the finite mask into an infinity. May return its input.
    """
    if temperature != 1.0:
        logits_TV = logits_TV / temperature
    if num_defined_ids < logits_TV.shape[-1]:
        undefined_V = torch.arange(logits_TV.shape[-1], device=logits_TV.device) >= num_defined_ids
        logits_TV = logits_TV.masked_fill(undefined_V, MASKED_LOGIT)
    return logits_TV


def row_slices(num_rows: int, row_chunk: int) -> Iterator[slice]:
    """Consecutive slices of at most `row_chunk` rows; one empty slice for no rows, so that shapes survive."""
    for start in range(0, max(num_rows, 1), row_chunk):
        yield slice(start, min(start + row_chunk, num_rows))


def _linear_fp32(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden_TH.dtype, weight_VH.dtype)
    if dtype in (torch.float32, torch.float64):
        return functional.linear(hidden_TH.to(dtype), weight_VH.to(dtype))
    function: Any = _LowPrecisionLinear
    product: Tensor = function.apply(hidden_TH.to(dtype), weight_VH.to(dtype))
    return product


class _LowPrecisionLinear(torch.autograd.Function):
    """h W^T of bf16 or fp16 inputs with an fp32 result, keeping only the low-precision inputs for the way back."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_TH, weight_VH)
        if hidden_TH.is_cuda:
            return torch.mm(hidden_TH, weight_VH.T, out_dtype=torch.float32)
        wide_TH = hidden_TH.float()
        blocks = row_slices(weight_VH.shape[0], _CAST_ROWS)
        return torch.cat([wide_TH @ weight_VH[rows].float().T for rows in blocks], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad_TV,) = grad_outputs
        hidden_TH, weight_VH = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad
        grad_TH = _times_weight(grad_TV, weight_VH).to(hidden_TH.dtype) if needs_hidden else None
        grad_VH = _transposed_times(grad_TV, hidden_TH).to(weight_VH.dtype) if needs_weight else None
        return grad_TH, grad_VH


def _times_weight(grad_TV: Tensor, weight_VH: Tensor) -> Tensor:
    if grad_TV.is_cuda:
        return torch.mm(grad_TV.to(weight_VH.dtype), weight_VH, out_dtype=torch.float32)
    grad_TH = grad_TV.new_zeros(grad_TV.shape[0], weight_VH.shape[1])
    for rows in row_slices(weight_VH.shape[0], _CAST_ROWS):
        grad_TH.addmm_(grad_TV[:, rows], weight_VH[rows].float())
    return grad_TH


def _transposed_times(grad_TV: Tensor, hidden_TH: Tensor) -> Tensor:
    if grad_TV.is_cuda:
        return torch.mm(grad_TV.T.to(hidden_TH.dtype), hidden_TH, out_dtype=torch.float32)
    return grad_TV.T @ hidden_TH.float()
