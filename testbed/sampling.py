"""Responses of a model to prompts, by the trainer's own rollout engine, with what a card says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from opd.types import FinishReason, Rollout
from services.trainer.rollout.base import RolloutRequest, SamplingParams, derive_seed
from services.trainer.rollout.transformers_engine import TransformersEngine
from testbed.tokenizer import prompt_text

LIVE_PROBABILITY = 0.01
# No more tokens than this can have the live probability at once.
_MAX_LIVE = round(1 / LIVE_PROBABILITY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One sampled response without its end-of-turn token; truncated when it hit the token limit."""

    text: str
    num_tokens: int
    truncated: bool
    entropies: tuple[float, ...]
    """Nats a position, at the sampling temperature."""
    num_live: tuple[int, ...]
    """Tokens of a probability above 0.01 a position, at the sampling temperature."""


def sample(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], sampling: SamplingParams
) -> list[Response]:
    """One response per prompt, in their order; the token limit gives way to the model's context."""
    engine = TransformersEngine(
        model,
        eos_token_ids=[tokenizer.eos_token_id],
        num_defined_ids=len(tokenizer),
        score_top_k=min(_MAX_LIVE, len(tokenizer)),
    )
    encoded = tokenizer([prompt_text(prompt) for prompt in prompts])["input_ids"]
    requests = [
        RolloutRequest(
            rollout_id=str(place),
            group=place,
            prompt_token_ids=np.array(ids, np.int32),
            seed=derive_seed(sampling.seed, place),
        )
        for place, ids in enumerate(encoded)
    ]
    room = engine.max_context - max(len(ids) for ids in encoded)
    limited = replace(sampling, max_response_tokens=min(sampling.max_response_tokens, room))
    return [_response(tokenizer, rollout) for rollout in engine.sample(requests, limited)]


def _response(tokenizer: PreTrainedTokenizerFast, rollout: Rollout) -> Response:
    ids, truncated = rollout.response_token_ids.tolist(), rollout.finish_reason is FinishReason.LENGTH
    live_R = (np.exp(rollout.topk_logprobs) > LIVE_PROBABILITY).sum(axis=-1)
    return Response(
        text=tokenizer.decode(ids if truncated else ids[:-1], skip_special_tokens=False),
        num_tokens=len(ids),
        truncated=truncated,
        entropies=tuple(rollout.entropy.tolist()),
        num_live=tuple(live_R.tolist()),
    )
