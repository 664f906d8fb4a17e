"""A small batched sampler: left-padded prompts, one KV cache, rows that finished are dropped on the way.

Independent of the services. The same seed, prompts and batch size give the same responses. Entropy and the number of
live tokens are those of the model's own distribution at temperature 1, whatever the sampling settings are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen3ForCausalLM

from testbed.architecture import MAX_CONTEXT_TOKENS
from testbed.tokenizer import prompt_text

LIVE_PROBABILITY = 0.01
DROP_SHARE = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to sample; the defaults are the training-time settings of the paper."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 192
    batch_rows: int = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One sampled response without its end-of-turn token; truncated when it hit the token limit."""

    text: str
    num_tokens: int
    truncated: bool
    entropies: tuple[float, ...]
    num_live: tuple[int, ...]


@dataclass(kw_only=True, slots=True)
class _Row:
    tokens: list[int]
    entropies: list[float]
    num_live: list[int]
    is_done: bool = False


def draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token per row; nucleus sampling keeps the smallest set of tokens that reaches top_p."""
    probs_BV = torch.softmax(logits_BV / sampling.temperature, dim=-1)
    if sampling.top_p < 1.0:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
        outside_BV = sorted_BV.cumsum(dim=-1) - sorted_BV >= sampling.top_p
        probs_BV = probs_BV.scatter(-1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))
    return torch.multinomial(probs_BV, 1, generator=generator)


def _left_padded(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> tuple[Tensor, Tensor]:
    encoded = tokenizer([prompt_text(prompt) for prompt in prompts])["input_ids"]
    width = max(len(ids) for ids in encoded)
    ids_BT = torch.full((len(encoded), width), tokenizer.pad_token_id)
    mask_BT = torch.zeros(len(encoded), width, dtype=torch.long)
    for row, ids in enumerate(encoded):
        ids_BT[row, width - len(ids) :] = torch.tensor(ids)
        mask_BT[row, width - len(ids) :] = 1
    return ids_BT, mask_BT


def _record(rows: list[_Row], tokens_B1: Tensor, logits_BV: Tensor, end: int) -> None:
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    probs_BV = logprobs_BV.exp()
    entropies = (-(probs_BV * logprobs_BV).sum(dim=-1)).tolist()
    live = (probs_BV > LIVE_PROBABILITY).sum(dim=-1).tolist()
    for row, token, entropy, num_live in zip(rows, tokens_B1[:, 0].tolist(), entropies, live, strict=True):
        if not row.is_done:
            row.tokens.append(token)
            row.entropies.append(entropy)
            row.num_live.append(num_live)
            row.is_done = token == end


@torch.inference_mode()
def _sample_batch(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    sampling: Sampling,
    generator: torch.Generator,
) -> list[_Row]:
    ids_BT, mask_BT = _left_padded(tokenizer, prompts)
    all_rows = [_Row(tokens=[], entropies=[], num_live=[]) for _ in prompts]
    rows, cache = all_rows, DynamicCache(config=model.config)
    positions_BT = (mask_BT.cumsum(dim=-1) - 1).clamp(min=0)
    for _ in range(min(sampling.max_tokens, MAX_CONTEXT_TOKENS - ids_BT.shape[1])):
        logits_BV = model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        ids_BT = draw(logits_BV, sampling, generator)
        _record(rows, ids_BT, logits_BV, tokenizer.eos_token_id)
        mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], dim=-1)
        positions_BT = positions_BT[:, -1:] + 1
        going = [place for place, row in enumerate(rows) if not row.is_done]
        if not going:
            break
        # Dropping rows copies the cache, so it waits until enough of them are done to pay for it.
        if len(going) <= DROP_SHARE * len(rows):
            kept = torch.tensor(going)
            rows = [rows[place] for place in going]
            ids_BT, mask_BT, positions_BT = ids_BT[kept], mask_BT[kept], positions_BT[kept]
            cache.batch_select_indices(kept)
    return all_rows


def _response(tokenizer: PreTrainedTokenizerFast, row: _Row) -> Response:
    ids = row.tokens[:-1] if row.is_done else row.tokens
    return Response(
        text=tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        num_tokens=len(row.tokens),
        truncated=not row.is_done,
        entropies=tuple(row.entropies),
        num_live=tuple(row.num_live),
    )


def sample(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], sampling: Sampling, seed: int
) -> list[Response]:
    """Sample one response per prompt, in the order of the prompts; batches are formed by length to pad little."""
    generator = torch.Generator().manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    responses: dict[int, Response] = {}
    model.eval()
    for start in range(0, len(order), sampling.batch_rows):
        places = order[start : start + sampling.batch_rows]
        rows = _sample_batch(model, tokenizer, [prompts[place] for place in places], sampling, generator)
        responses |= {place: _response(tokenizer, row) for place, row in zip(places, rows, strict=True)}
    return [responses[place] for place in range(len(prompts))]
