import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from opd.errors import ConfigError
from opd.types import Scores
from services.teacher_server.engines import model_folder, transformers_model
from services.teacher_server.engines.transformers_engine import EngineLimits, load_engine
from tests.unit.teacher_server.tiny_teachers import (
    VOCAB_ROWS,
    make_request,
    reference_scores,
    save_tiny_teacher,
    save_tokenizer,
)


def load(folder: Path | str, **changes: Any) -> Any:
    settings = {"teacher": "tiny", "device": "cpu", "dtype": "float32", "max_context": 0, "limits": EngineLimits()}
    return load_engine(str(folder), **(settings | changes))


SMALL = {
    "vocab_size": VOCAB_ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "eos_token_id": 0,
    "bos_token_id": 1,
    "pad_token_id": 2,
}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0, query_pre_attn_scalar=8)
    ),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
    "learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB_ROWS, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_an_architecture_does_to_its_logits_is_taken_over(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    ARCHITECTURES[name]().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    request = make_request(1, num_response=15, wants_entropy=True)
    (scores,) = load(tmp_path).score([request])
    assert isinstance(scores, Scores)
    expected = reference_scores(tmp_path, request)
    np.testing.assert_allclose(scores.sampled_logprobs, expected.sampled_logprobs, atol=1e-4)
    np.testing.assert_allclose(scores.entropy, expected.entropy, atol=1e-4)


@pytest.mark.parametrize(("rope", "expected"), [({}, True), ({"rope_type": "dynamic", "factor": 2.0}, False)])
def test_a_model_that_rewrites_itself_in_a_pass_runs_one_at_a_time(
    rope: dict[str, Any], expected: bool, tmp_path: Path
) -> None:
    parameters = {"rope_type": "default", "rope_theta": 10_000.0} | rope
    LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters=parameters)).save_pretrained(
        tmp_path
    )
    save_tokenizer(tmp_path)
    found = transformers_model.load_model(tmp_path, device="cpu", dtype="float32", max_context=0)
    assert found.runs_in_threads is expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_teacher(tmp_path / "tiny")


def loaded(folder: Path) -> tuple[Any, transformers_model.LoadedModel]:
    ready = transformers_model.load_model(folder, device="cpu", dtype="float32", max_context=0)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), ready


def test_a_head_that_does_more_than_we_know_is_refused_by_name(folder: Path) -> None:
    model, ready = loaded(folder)
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output * 1.01)
    with pytest.raises(ConfigError, match="type qwen3 changes its logits in a way this engine does not know"):
        transformers_model.check_head(folder, model, ready)


def test_a_model_that_looks_ahead_is_refused(folder: Path) -> None:
    _, ready = loaded(folder)

    class LooksAhead(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            outputs = ready.decoder(input_ids=input_ids, use_cache=False)
            outputs.last_hidden_state = outputs.last_hidden_state + outputs.last_hidden_state.mean(1, keepdim=True)
            return outputs

    with pytest.raises(ConfigError, match="is not causal"):
        transformers_model.check_causal(folder, replace(ready, decoder=LooksAhead()))


def break_nothing(folder: Path) -> None:
    folder.rename(folder.parent / "moved")


def drop_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()


def drop_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def cut_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3')


def unknown_type(folder: Path) -> None:
    change_config(folder, model_type="nothing_known")


def more_layers(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)


def other_shape(folder: Path) -> None:
    change_config(folder, intermediate_size=64)


def larger_tokenizer(folder: Path) -> None:
    save_tokenizer(folder, VOCAB_ROWS + 4)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing, "no such folder"),
        (drop_configuration, "has no config.json"),
        (drop_tokenizer, "has no tokenizer"),
        (drop_weights, r"has no \*.safetensors"),
        (pickle_weights, "only pickled weights"),
        (cut_weights, "cannot be loaded"),
        (cut_tokenizer, "its tokenizer cannot be loaded"),
        (unknown_type, "cannot be loaded"),
        (more_layers, "weights are missing, such as model.layers.2"),
        (other_shape, "cannot be loaded"),
        (larger_tokenizer, "100 ids and the output head has only 96 rows"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_folder_is_one_line_that_names_it(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder)
    assert str(folder) in caught.value.message and "\n" not in caught.value.message


def test_a_file_or_an_impossible_device_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is a file"):
        load(folder / "config.json")
    with pytest.raises(ConfigError, match="device=warp: is no device"):
        load(folder, device="warp")
    with pytest.raises(ConfigError, match="CUDA devices are visible"):
        load(folder, device="cuda:99")


def test_the_context_is_the_smaller_of_model_and_setting(folder: Path) -> None:
    assert load(folder, max_context=40).info().max_context == 40
    assert load(folder, max_context=4000).info().max_context == 128


def test_the_fingerprint_follows_what_decides_scores(folder: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path, **changes: Any) -> str:
        return str(load(path, **changes).info().fingerprint)

    first = fingerprint(folder)
    assert fingerprint(save_tiny_teacher(tmp_path / "copy")) == first
    assert fingerprint(folder, dtype="bfloat16") != first
    assert fingerprint(save_tiny_teacher(tmp_path / "other", seed=1)) != first
    change_config(folder, transformers_version="0.0", use_cache=False)
    assert fingerprint(folder) == first
    change_config(folder, rms_norm_eps=1e-3)
    assert fingerprint(folder) != first


def test_the_weights_hash_is_cached_until_the_file_changes(folder: Path, tmp_path: Path) -> None:
    cache, path = tmp_path / "cache", folder / "model.safetensors"
    first = model_folder.hash_weights([path], cache)
    (entry,) = cache.iterdir()
    entry.write_text(json.dumps({"sha256": "from the cache"}))
    assert model_folder.hash_weights([path], cache) == "from the cache"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(1, 1))
    assert model_folder.hash_weights([path], cache) not in ("from the cache", first)


def test_an_unwritable_cache_only_costs_time(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert len(model_folder.hash_weights([folder / "model.safetensors"], blocked / "cache")) == 64
    assert "is not cached" in caplog.text
