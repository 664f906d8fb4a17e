"""Choosing the next token of many rows at once, each by its own uniform number.

Shapes: B rows, V vocabulary. Sampling inverts the cumulative distribution, accumulated in float64: exact for any
vocabulary size, one uniform per token. With top-k or top-p the distribution is first ordered, most likely first and
ties to the lower id, and cut after the smallest prefix that fulfils the limit.
"""

from dataclasses import dataclass

import torch

from opd.ops.running_sums import running_sums
from services.trainer.rollout.base import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One token a row."""

    token_ids_B: torch.Tensor
    """int64"""
    kept_log_mass_B: torch.Tensor
    """float32: log of the mass the sampler kept, at the sampling temperature (1 when greedy); 0 when it kept all."""


def choose_tokens(logits_BV: torch.Tensor, uniforms_B: torch.Tensor, sampling: SamplingParams) -> Choice:
    """Samples by temperature, top-k, then top-p of what top-k leaves. `logits_BV` float32, not yet divided."""
    if sampling.temperature == 0:
        # max() promises no order among equals; the first position of the maximum is the lowest id.
        is_best_BV = logits_BV == logits_BV.max(dim=-1, keepdim=True).values
        token_ids_B = is_best_BV.to(torch.uint8).argmax(dim=-1)
        kept_log_mass_B = logits_BV.gather(1, token_ids_B[:, None])[:, 0] - logits_BV.logsumexp(dim=-1)
        return Choice(token_ids_B=token_ids_B, kept_log_mass_B=kept_log_mass_B)
    probabilities_BV = torch.softmax(logits_BV / sampling.temperature, dim=-1)
    if sampling.top_p == 1 and sampling.top_k == -1:
        token_ids_B = _invert(running_sums(probabilities_BV), uniforms_B)
        return Choice(token_ids_B=token_ids_B, kept_log_mass_B=torch.zeros_like(logits_BV[:, 0]))
    return _choose_from_top(probabilities_BV, uniforms_B, sampling)


def _choose_from_top(probabilities_BV: torch.Tensor, uniforms_B: torch.Tensor, sampling: SamplingParams) -> Choice:
    ordered_BV, ids_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k != -1:
        ordered_BV, ids_BV = ordered_BV[:, : sampling.top_k], ids_BV[:, : sampling.top_k]
    cumulative_BV = running_sums(ordered_BV)
    if sampling.top_p < 1:
        threshold_B1 = cumulative_BV[:, -1:] * sampling.top_p
        mass_before_BV = cumulative_BV - ordered_BV
        num_kept_B1 = (mass_before_BV < threshold_B1).sum(dim=-1, keepdim=True).clamp(min=1)
        kept_mass_B1 = cumulative_BV.gather(1, num_kept_B1 - 1)
        cumulative_BV = cumulative_BV.minimum(kept_mass_B1)
    token_ids_B = ids_BV.gather(1, _invert(cumulative_BV, uniforms_B)[:, None])[:, 0]
    return Choice(token_ids_B=token_ids_B, kept_log_mass_B=cumulative_BV[:, -1].log().to(torch.float32))


def _invert(cumulative_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative mass is above uniform * total, so never one without mass."""
    targets_B1 = (uniforms_B * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, targets_B1, right=True)[:, 0].clamp(max=cumulative_BV.shape[-1] - 1)
