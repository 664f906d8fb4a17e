"""No dropout in training mode, in architectures whose layers read the rate in their own ways."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from services.trainer.batch import build_batch
from services.trainer.student import Student
from tests.unit.trainer.test_batch import scored
from tests.unit.trainer.tiny_training import NUM_IDS

RATE = 0.3
SIZES: dict[str, Any] = {"vocab_size": NUM_IDS, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


def bloom() -> PreTrainedModel:
    """Layers keep a rate and pass it to a function."""
    sizes = {"vocab_size": NUM_IDS, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    return BloomForCausalLM(BloomConfig(**sizes, hidden_dropout=RATE, attention_dropout=RATE))


def falcon() -> PreTrainedModel:
    """Layers read the rates from the configuration in every pass."""
    return FalconForCausalLM(FalconConfig(**SIZES, alibi=False, hidden_dropout=RATE, attention_dropout=RATE))


def opt() -> PreTrainedModel:
    """Whole layers are dropped."""
    config = OPTConfig(
        **SIZES, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64,
        dropout=RATE, attention_dropout=RATE, layerdrop=RATE,
    )  # fmt: skip
    return OPTForCausalLM(config)


def qwen() -> PreTrainedModel:
    """The rate of the attention is a number that goes to a function."""
    return Qwen3ForCausalLM(
        Qwen3Config(**SIZES, intermediate_size=32, num_key_value_heads=1, head_dim=8, attention_dropout=RATE)
    )


MODELS = pytest.mark.parametrize("make", [bloom, falcon, opt, qwen])


@MODELS
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_passes_agree_to_the_bit(make: Callable[[], PreTrainedModel], gradient_checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = make().eval()
    batch = build_batch([scored("a", [5, 6, 7], [8, 9, 1], k=4), scored("b", [3], [4, 2, 2, 2, 2], k=4)])
    student = Student(model, num_defined_ids=NUM_IDS, gradient_checkpointing=gradient_checkpointing)
    passes = []
    for _ in range(4):
        model.zero_grad()
        logprobs_TK = student.scores(batch, batch.support_ids_TK).logprobs_TK
        assert model.training is gradient_checkpointing
        # Backwards, layers are computed once more where they are recomputed.
        logprobs_TK.sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        passes.append(torch.cat([logprobs_TK.detach().flatten(), gradient]))
    assert passes[0].isfinite().all() and passes[0].any()
    for later in passes[1:]:
        assert torch.equal(later, passes[0])


@MODELS
def test_what_is_saved_of_the_model_keeps_its_rates(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "before")
    Student(model, num_defined_ids=NUM_IDS, gradient_checkpointing=True)
    model.save_pretrained(tmp_path / "after")
    model.base_model.config.save_pretrained(tmp_path / "inner")
    before, after, inner = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after", "inner")
    )
    assert before["attention_dropout"] == RATE
    assert after == inner == before


def test_layers_still_hear_of_a_change_of_the_configuration() -> None:
    """The attention of a pass is chosen there."""
    model = falcon()
    Student(model, num_defined_ids=NUM_IDS)
    layer = model.base_model.h[0]
    assert (layer.config.hidden_dropout, model.config.hidden_dropout) == (0.0, RATE)
    assert isinstance(layer.config, FalconConfig)
    model.config._attn_implementation = "sdpa_of_a_test"
    assert layer.config._attn_implementation == "sdpa_of_a_test"
