"""Sizes of the model family and how members are created, saved and loaded.

All members are standard Qwen3 models with tied embeddings, saved with their tokenizer and generation settings, so
that any tool that loads a folder of Hugging Face weights can load them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

MAX_CONTEXT_TOKENS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Shape of one model; weights are stored as dtype."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    dtype: torch.dtype

    head_dim: int = 32


SMALL = Size(hidden=128, layers=4, heads=4, key_value_heads=2, intermediate=384, dtype=torch.float32)
BIG = Size(hidden=192, layers=4, heads=6, key_value_heads=3, intermediate=512, dtype=torch.bfloat16)


def create_model(size: Size, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A freshly initialised fp32 model; the same seed gives the same weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.head_dim,
        max_position_embeddings=MAX_CONTEXT_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def save_model(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, dtype: torch.dtype) -> None:
    """Write weights, configuration, tokenizer and generation settings; the model given is left as it is."""
    stored = Qwen3ForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored.to(dtype)
    stored.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(folder: Path) -> Qwen3ForCausalLM:
    """Load for computing in fp32, whatever dtype the folder stores."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def count_parameters(model: Qwen3ForCausalLM) -> int:
    """Number of distinct parameters; the tied head counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
