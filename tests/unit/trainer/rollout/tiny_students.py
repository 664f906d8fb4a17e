"""Tiny random students and the reference their rollouts are compared with: plain forward passes in float64."""

from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.types import Rollout
from services.trainer.rollout.base import RolloutRequest, derive_seed
from services.trainer.rollout.transformers_engine import TransformersEngine

VOCAB, DEFINED, EOS = 48, 40, (1, 2)
TOLERANCE = 1e-4


def qwen(seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**(settings | changes)))
    sharpen(model)
    return model.eval()


def sharpen(model: Any) -> None:
    """Random weights give nearly uniform predictions, in which mistakes could hide."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(25.0)


def engine(model: Any, **changes: Any) -> TransformersEngine:
    settings: dict[str, Any] = {"eos_token_ids": EOS, "num_defined_ids": DEFINED, "score_top_k": 5, "max_slots": 8}
    return TransformersEngine(model, **(settings | changes))


def requests(count: int, *, seed: int = 0, longest: int = 14) -> list[RolloutRequest]:
    generator = np.random.default_rng(seed)
    return [
        RolloutRequest(
            rollout_id=f"run.0.{index}",
            group=index // 2,
            prompt_token_ids=generator.integers(3, DEFINED, size=1 + index * longest // max(count, 1)).astype(np.int32),
            seed=derive_seed(seed, index),
        )
        for index in range(count)
    ]


def full_logprobs(model: Any, rollout: Rollout, temperature: float) -> np.ndarray:
    """[R, DEFINED] float64, from one forward pass over prompt and response, without a cache."""
    token_ids = np.concatenate([rollout.prompt_token_ids, rollout.response_token_ids]).astype(np.int64)
    with torch.no_grad():
        logits = model(torch.from_numpy(token_ids)[None]).logits[0].numpy().astype(np.float64)
    start = rollout.prompt_token_ids.size - 1
    tempered = logits[start : start + rollout.response_token_ids.size, :DEFINED] / temperature
    shifted = tempered - tempered.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def assert_recorded_exactly(model: Any, rollout: Rollout, temperature: float = 1.0) -> None:
    expected = full_logprobs(model, rollout, temperature)
    rows = np.arange(rollout.response_token_ids.size)
    np.testing.assert_allclose(
        rollout.sampled_logprobs, expected[rows, rollout.response_token_ids], atol=TOLERANCE, rtol=0
    )
    np.testing.assert_allclose(rollout.entropy, -(np.exp(expected) * expected).sum(axis=1), atol=TOLERANCE, rtol=0)
    order = np.argsort(-expected, axis=1, kind="stable")[:, : rollout.topk_token_ids.shape[1]]
    np.testing.assert_allclose(
        rollout.topk_logprobs, np.take_along_axis(expected, order, axis=1), atol=TOLERANCE, rtol=0
    )
    # Where two neighbours in the ranking are closer than rounding, their order is not defined by the reference.
    chosen = np.take_along_axis(expected, rollout.topk_token_ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(chosen, np.take_along_axis(expected, order, axis=1), atol=TOLERANCE, rtol=0)
