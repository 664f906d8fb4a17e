"""Attention of one new token a row over cached keys, without copying the keys of shared heads.

Where several query heads share a key-value head, transformers repeats keys and values before a masked attention: a copy
of the whole cache per layer and token. Here the query heads of a group become query positions instead, since all
of them look at the same places: same sums, no copy. Everything but that case goes to transformers' own function.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION_NAME = "sdpa_grouped_decode"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query [N, heads, Q, D], key and value [N, H, L, D] -> output [N, Q, heads, D], and no weights."""
    num_rows, num_heads, num_queries, head_size = query.shape
    num_groups = key.shape[1]
    is_plain = all(option is None for name, option in kwargs.items() if name in ("s_aux", "position_bias", "cache"))
    if num_queries != 1 or num_groups == num_heads or not is_plain:
        output: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    grouped = query.reshape(num_rows, num_groups, num_heads // num_groups, head_size)
    attended = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(num_rows, 1, num_heads, value.shape[-1]), None


AttentionInterface.register(ATTENTION_NAME, grouped_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
