"""A Qwen3 of random weights with a tokenizer, of any shape: speed does not depend on what the weights are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd.types import Ids, ScoreRequest

TENANT, TEACHER = "bench", "random"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Of a model. The default is the one of `score_throughput`."""

    hidden: int = 512
    layers: int = 8
    heads: int = 8
    key_value_heads: int = 4
    head_dim: int = 64
    intermediate: int = 1536
    vocabulary: int = 32_000
    context: int = 4096


QWEN3_1_7B = Shape(
    hidden=2048, layers=28, heads=16, key_value_heads=8, head_dim=128, intermediate=6144, vocabulary=151_936,
    context=40_960,
)  # fmt: skip
QWEN3_4B = Shape(
    hidden=2560, layers=36, heads=32, key_value_heads=8, head_dim=128, intermediate=9728, vocabulary=151_936,
    context=40_960,
)  # fmt: skip


def decoder_flops_per_token(shape: Shape, num_tokens: int) -> float:
    """Of the layers' forward pass over sequences of so many tokens: two for each weight, plus causal attention."""
    attention_size = shape.heads * shape.head_dim
    projections = shape.hidden * (2 * attention_size + 2 * shape.key_value_heads * shape.head_dim)
    layer = 2 * (projections + 3 * shape.hidden * shape.intermediate)
    return shape.layers * (layer + 4 * attention_size * num_tokens / 2)


def build_model(shape: Shape, dtype: str = "float32") -> Any:
    """A `Qwen3ForCausalLM` with tied embeddings; seeded."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim, max_position_embeddings=shape.context, tie_word_embeddings=True, eos_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(getattr(torch, dtype))


def save_model(folder: Path, shape: Shape) -> None:
    """Weights, configuration and a tokenizer with a word for every id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    words = {"<eos>": 0} | {f"w{index}": index for index in range(1, shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    build_model(shape).save_pretrained(folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Requests as a trainer makes them: everything asked for at k ids a position."""

    num_prompt: int = 64
    num_response: int = 448
    k: int = 16
    vocabulary: int = 32_000

    def requests(self, name: str, count: int, *, num_prompts: int | None = None) -> list[ScoreRequest]:
        """`count` requests over so many prompts (all different when not told), random in `name`."""
        generator = np.random.default_rng([ord(letter) for letter in name])
        prompts = [self._ids(generator, self.num_prompt) for _ in range(num_prompts or count)]
        return [
            ScoreRequest(
                rollout_id=f"{name}.0.{place}",
                tenant=TENANT,
                teacher=TEACHER,
                prompt_token_ids=prompts[place % len(prompts)],
                response_token_ids=self._ids(generator, self.num_response),
                candidate_token_ids=self._ids(generator, self.num_response, self.k),
                score_top_k=self.k,
                wants_entropy=True,
            )
            for place in range(count)
        ]

    def _ids(self, generator: np.random.Generator, *shape: int) -> Ids:
        return generator.integers(1, self.vocabulary, shape, np.int32)
