"""What is handed out is the model itself: hidden states and head give back its own log-probs, exactly."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd.errors import ConfigError
from opd.ops import OutputHead, full_logprobs
from opd.types import Capability, ScoreRequest, Scores
from services.teacher_server.engines.shared_head import share_head
from services.teacher_server.engines.transformers_engine import EngineLimits, TransformersEngine, load_engine
from tests.unit.teacher_server.engines.test_model_loading import ARCHITECTURES
from tests.unit.teacher_server.tiny_teachers import (
    NUM_DEFINED_IDS,
    VOCAB_ROWS,
    make_request,
    reference_logprobs,
    save_tiny_teacher,
    save_tokenizer,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(folder: Path, dtype: str = "float32") -> TransformersEngine:
    limits = EngineLimits(serves_hidden_states=True)
    return load_engine(str(folder), teacher="tiny", device="cpu", dtype=dtype, max_context=0, limits=limits)


def handed_out_head(engine: TransformersEngine) -> OutputHead:
    """Made of nothing but the bytes and the handshake, as a client has it."""
    shared, info = engine.output_head(), engine.info()
    dtype = DTYPES[shared.dtype]

    def tensor(data: Any, *shape: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)

    return OutputHead(
        weight_VH=tensor(shared.weight, *shared.shape),
        bias_V=tensor(shared.bias, shared.shape[0]) if shared.bias else None,
        logit_scale=info.logit_scale,
        soft_cap=info.logit_softcap,
    )


def one(engine: TransformersEngine, request: ScoreRequest) -> Scores:
    (outcome,) = engine.score([request])
    assert isinstance(outcome, Scores)
    return outcome


def rebuilt(engine: TransformersEngine, scores: Scores, temperature: float = 1.0) -> np.ndarray:
    assert scores.hidden_states is not None
    blocks = full_logprobs(
        torch.from_numpy(scores.hidden_states),
        handed_out_head(engine),
        num_defined_ids=engine.info().num_defined_ids,
        temperature=temperature,
        row_chunk=4,
    )
    return torch.cat(list(blocks)).numpy()


def wanting(seed: int, **changes: Any) -> ScoreRequest:
    """Hidden states and, to compare with, the teacher's own log-prob of every defined id."""
    plain = make_request(seed, num_response=15, wants_hidden_states=True, **changes)
    everything = np.tile(np.arange(NUM_DEFINED_IDS, dtype=np.int32), (15, 1))
    return replace(plain, candidate_token_ids=everything)


@pytest.fixture(params=["plain", "biased", *ARCHITECTURES])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(3)
    if request.param == "plain":
        return save_tiny_teacher(tmp_path / "tiny")
    if request.param == "biased":
        from transformers import PhiConfig, PhiForCausalLM

        model: Any = PhiForCausalLM(
            PhiConfig(
                vocab_size=VOCAB_ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=64, initializer_range=0.3, eos_token_id=0,
            )
        )  # fmt: skip
        with torch.no_grad():
            model.lm_head.bias.normal_()
    else:
        model = ARCHITECTURES[request.param]()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_hidden_states_and_head_give_the_teachers_own_log_probs(folder: Path, temperature: float) -> None:
    engine = load(folder)
    request = wanting(1, teacher_temperature=temperature)
    scores = one(engine, request)
    found = rebuilt(engine, scores, temperature)
    assert np.abs(found - scores.candidate_logprobs).max() <= 1e-5
    assert np.abs(found - reference_logprobs(folder, request, NUM_DEFINED_IDS)).max() <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_low_precision_teacher_is_rebuilt_to_the_last_bit(tmp_path: Path, dtype: str) -> None:
    engine = load(save_tiny_teacher(tmp_path / "tiny"), dtype)
    scores = one(engine, wanting(1))
    assert scores.hidden_states is not None and engine.output_head().dtype == dtype
    stored = torch.from_numpy(scores.hidden_states)
    assert torch.equal(stored.to(DTYPES[dtype]).float(), stored)
    np.testing.assert_allclose(rebuilt(engine, scores), scores.candidate_logprobs, atol=2e-6, rtol=0)


def test_the_handshake_declares_the_head_and_the_bytes_have_its_hash(folder: Path) -> None:
    engine = load(folder)
    info, shared = engine.info(), engine.output_head()
    assert Capability.HIDDEN_STATES in info.capabilities
    assert (info.vocab_rows, info.hidden_size) == shared.shape == (VOCAB_ROWS, 32)
    assert info.output_head_hash == hashlib.sha256(bytes(shared.weight) + shared.bias).hexdigest()
    assert len(shared.weight) == 4 * VOCAB_ROWS * 32 and len(shared.bias) in (0, 4 * VOCAB_ROWS)


def test_only_scored_rows_are_handed_out(tmp_path: Path) -> None:
    engine = load(save_tiny_teacher(tmp_path / "tiny"))
    scored_rows = np.arange(15) % 3 == 0
    whole = one(engine, make_request(1, num_response=15, wants_hidden_states=True))
    some = one(engine, make_request(1, num_response=15, wants_hidden_states=True, scored_rows=scored_rows))
    assert whole.hidden_states is not None and some.hidden_states is not None
    np.testing.assert_array_equal(some.hidden_states[scored_rows], whole.hidden_states[scored_rows])
    assert np.isnan(some.hidden_states[~scored_rows]).all()
    assert one(engine, make_request(1)).hidden_states is None


def test_they_are_off_unless_told(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "tiny")
    engine = load_engine(
        str(folder), teacher="tiny", device="cpu", dtype="float32", max_context=0, limits=EngineLimits()
    )
    info = engine.info()
    assert Capability.HIDDEN_STATES not in info.capabilities
    assert (info.hidden_size, info.output_head_hash, info.logit_softcap) == (0, "", None)


def test_a_bias_of_another_dtype_than_the_weight_is_refused() -> None:
    head = OutputHead(weight_VH=torch.zeros(3, 2, dtype=torch.bfloat16), bias_V=torch.zeros(3))
    with pytest.raises(ConfigError, match=r"hidden_states\.enabled=true: the output head's bias is torch\.float32"):
        share_head(head)


def test_states_after_a_shared_prompt_are_those_of_a_request_alone(tmp_path: Path) -> None:
    engine = load(save_tiny_teacher(tmp_path / "tiny"))
    first = make_request(1, num_prompt=80, num_response=15, wants_hidden_states=True)
    siblings = [
        replace(make_request(seed, num_response=15, wants_hidden_states=True), prompt_token_ids=first.prompt_token_ids)
        for seed in (2, 3, 4)
    ]
    one(engine, first)
    outcomes = engine.score(siblings)
    for request, outcome in zip(siblings, outcomes, strict=True):
        alone = one(load(tmp_path / "tiny"), request)
        assert isinstance(outcome, Scores) and outcome.hidden_states is not None and alone.hidden_states is not None
        np.testing.assert_allclose(outcome.hidden_states, alone.hidden_states, atol=1e-4, rtol=0)
        assert np.abs(rebuilt(engine, outcome) - rebuilt(engine, alone)).max() <= 1e-4
