"""Loading real folders, and refusing broken ones in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd.errors import ConfigError
from services.trainer.models import LoadedModel, load_model, load_tokenizer, require_savable

WEIGHTS = "model.safetensors"


def saved_folder(folder: Path, *, seed: int = 0, max_shard_size: str = "1GB") -> Path:
    words = {"<pad>": 0, "<end>": 1, "<stop>": 2, "a": 3, "b": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=2,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[2])
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_folder(tmp_path / "tiny")


def load(folder: Path, **changes: Any) -> LoadedModel:
    return load_model(str(folder), device="cpu", **changes)


def test_a_folder_is_loaded_with_all_that_belongs_to_it(folder: Path) -> None:
    loaded = load(folder)
    assert (loaded.name, loaded.eos_token_ids, loaded.num_defined_ids) == ("tiny", (1, 2), 5)
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    stored = load_file(folder / WEIGHTS)
    torch.testing.assert_close(loaded.model.state_dict()["lm_head.weight"], stored["lm_head.weight"], rtol=0, atol=0)
    assert load(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert loaded.tokenizer.convert_ids_to_tokens(4) == "b"


def test_shards_are_loaded_too(tmp_path: Path) -> None:
    whole = load(saved_folder(tmp_path / "whole"))
    folder = saved_folder(tmp_path / "shards", max_shard_size="1KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert load(folder).fingerprint == whole.fingerprint


def test_the_fingerprint_follows_the_weights_and_the_dtype(tmp_path: Path, folder: Path) -> None:
    same = saved_folder(tmp_path / "same")
    other = saved_folder(tmp_path / "other", seed=1)
    fingerprint = load(folder).fingerprint
    assert load(same).fingerprint == fingerprint
    assert len({fingerprint, load(other).fingerprint, load(folder, dtype="bfloat16").fingerprint}) == 3


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "rms_norm_eps", 1e-3),
        ("config.json", "rope_parameters", {"rope_theta": 500.0, "rope_type": "default"}),
        ("generation_config.json", "eos_token_id", [2, 3]),
    ],
)
def test_the_fingerprint_follows_what_the_weights_do_not_tell(name: str, key: str, value: Any, folder: Path) -> None:
    fingerprint = load(folder).fingerprint
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    assert content[key] != value
    (folder / name).write_text(json.dumps(content | {key: value}), encoding="utf-8")
    assert load(folder).fingerprint != fingerprint


def test_the_fingerprint_does_not_follow_the_tool_that_wrote_the_folder(tmp_path: Path, folder: Path) -> None:
    again = tmp_path / "again"
    loaded = load(folder)
    loaded.model.save_pretrained(again)
    loaded.tokenizer.save_pretrained(again)
    content = json.loads((again / "config.json").read_text(encoding="utf-8"))
    (again / "config.json").write_text(json.dumps(content | {"transformers_version": "5.0.0", "use_cache": False}))
    assert load(again).fingerprint == loaded.fingerprint


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def with_pickled_weights(folder: Path) -> None:
    without_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def with_broken_weights(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def with_empty_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def without_a_layer(folder: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "mlp.up_proj" not in name}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def without_a_shard(folder: Path) -> None:
    shutil.rmtree(folder)
    saved_folder(folder, max_shard_size="1KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()


def with_broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{", encoding="utf-8")


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")


def without_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def without_eos(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    for name, keys in (("config.json", ["eos_token_id"]), ("tokenizer_config.json", ["eos_token"])):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(
            json.dumps({key: value for key, value in content.items() if key not in keys}), encoding="utf-8"
        )


def of_an_unknown_architecture(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(content | {"model_type": "abacus"}), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such folder; give a Hugging Face folder or a hub name"),
        (without_config, "no config.json"),
        (without_weights, "no weights; save the model as safetensors"),
        (with_pickled_weights, "only pickled weights; save the model as safetensors"),
        (with_broken_weights, r"model\.safetensors is broken"),
        (with_empty_weights, r"model\.safetensors is broken"),
        (without_a_layer, r"1 weights are missing, such as model\.layers\.0\.mlp\.up_proj\.weight"),
        (without_a_shard, r"model-00002-of-\d+\.safetensors is missing"),
        (with_broken_index, r"index\.json is no index of weights"),
        (without_tokenizer, "no usable tokenizer"),
        (with_broken_tokenizer, "no usable tokenizer"),
        (without_chat_template, "its tokenizer has no chat template"),
        (without_eos, "name an EOS"),
        (of_an_unknown_architecture, "abacus"),
    ],
)
def test_a_broken_folder_is_refused_in_one_line(spoil: Any, message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder)
    text = str(caught.value)
    assert text.startswith(f"model {folder}: ")
    assert "; " in text and "\n" not in text


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load(folder / WEIGHTS)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "runs/one/two", "nowhere.safetensors"])
def test_what_looks_like_a_path_is_not_taken_for_a_hub_name(name: str) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load_model(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype: unknown name 'int8'; choose one of float32"),
        ({"device": "abacus"}, "device: 'abacus' is unknown; choose auto"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not here"),
    ],
)
def test_unknown_devices_and_types_are_refused(changes: dict[str, str], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(str(folder), **changes)


def test_a_tokenizer_can_be_loaded_alone(folder: Path) -> None:
    without_weights(folder)
    assert load_tokenizer(str(folder)).eos_token == "<end>"


def change_generation_settings(folder: Path, **settings: Any) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings), encoding="utf-8")


def test_sampling_flags_of_greedy_settings_do_not_keep_a_model_from_being_saved(folder: Path, tmp_path: Path) -> None:
    change_generation_settings(folder, temperature=0.6, top_p=0.9, do_sample=False)
    loaded = load(folder)
    require_savable(loaded)
    loaded.model.save_pretrained(tmp_path / "again")
    change_generation_settings(folder, do_sample=True)
    load(folder).model.save_pretrained(tmp_path / "sampling")
    saved = [json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("again", "sampling")]
    assert saved[0].get("temperature") is None and saved[0]["eos_token_id"] == saved[1]["eos_token_id"]
    assert (saved[1]["temperature"], saved[1]["top_p"]) == (0.6, 0.9)


def test_what_cannot_be_saved_is_refused_before_it_is_trained(folder: Path) -> None:
    change_generation_settings(folder, length_penalty=2.0)
    with pytest.raises(ConfigError, match=r"could not be saved after training \(.*length_penalty.*generation_config"):
        require_savable(load(folder))
