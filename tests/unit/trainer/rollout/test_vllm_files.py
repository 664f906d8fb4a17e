"""Versions of weights on disk: whole, of one copy, and with room for them."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd.errors import ConfigError, RolloutEngineError
from services.trainer.lora import Adapter
from services.trainer.lora_config import LoraSettings
from services.trainer.rollout.vllm_files import VersionFolder, check_version, tensors_of
from tests.unit.trainer.rollout.tiny_students import qwen


def test_a_version_is_the_models_weights_and_is_marked_last(tmp_path: Path) -> None:
    folder, model = VersionFolder(tmp_path), qwen()
    written = folder.write(model, 3, torch.float32)
    check_version(written, 3, tensors_of(written))
    (file,) = written.glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(found[name], value) for name, value in model.named_parameters())
    mark = json.loads((written / "complete.json").read_text(encoding="utf-8"))
    assert mark == {"version": 3, "sizes": {file.name: file.stat().st_size}}
    assert [path.name for path in folder.path.iterdir()] == ["version-3"]
    folder.forget(written)
    assert list(folder.path.iterdir()) == []
    folder.close()
    assert not folder.path.exists()


def test_tied_weights_are_written_once_in_the_engines_dtype(tmp_path: Path) -> None:
    model = qwen(tie_word_embeddings=True)
    written = VersionFolder(tmp_path).write(model, 0, torch.bfloat16)
    (file,) = written.glob("*.safetensors")
    found = load_file(file)
    assert "lm_head.weight" not in found and "model.embed_tokens.weight" in found
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert model.lm_head.weight.dtype == torch.float32


def test_adapters_are_merged_into_what_is_written_and_not_into_the_model(tmp_path: Path) -> None:
    qwen(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model, folder = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), VersionFolder(tmp_path)
    plain = tensors_of(folder.write(model, 0, torch.float32))
    base = {name: value.clone() for name, value in model.named_parameters()}
    Adapter(model, LoraSettings(rank=2, alpha=4.0, target_modules=("q_proj", "down_proj")), base=str(tmp_path / "base"))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.normal_()
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    written = folder.write(model, 1, torch.float32)
    check_version(written, 1, plain)
    assert torch.equal(model(input_ids=ids).logits, before)
    found = load_file(next(written.glob("*.safetensors")))
    changed = {name for name, value in found.items() if not torch.equal(value, base[name])}
    assert changed and all(name.endswith(("q_proj.weight", "down_proj.weight")) for name in changed)
    again = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    assert torch.allclose(again(input_ids=ids).logits, before, atol=1e-5)


def test_other_tensors_are_named(tmp_path: Path) -> None:
    folder = VersionFolder(tmp_path)
    expected = tensors_of(folder.write(qwen(), 1, torch.float32))
    for version, model in ((2, qwen(num_hidden_layers=1)), (3, qwen(intermediate_size=32))):
        with pytest.raises(RolloutEngineError, match=r"model\.layers\..* is not as the model has it; it is not loaded"):
            check_version(folder.write(model, version, torch.float32), version, expected)


class Huge:
    """A model of 4 TiB, of which nothing exists but the shape."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.empty(2**40, device="meta")}


def test_a_folder_without_room_is_named_before_anything_is_written(tmp_path: Path) -> None:
    folder = VersionFolder(tmp_path)
    with pytest.raises(RolloutEngineError, match=r"take 4194305 MiB and .* free; set rollout\.vllm\.weights_folder"):
        folder.write(Huge(), 1, torch.float32)
    assert list(folder.path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^rollout\.vllm\.weights_folder=/proc: .*; give a folder that can"):
        VersionFolder(Path("/proc"))
    with pytest.raises(ConfigError, match=r"nowhere: No such file or directory"):
        VersionFolder(tmp_path / "nowhere")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no shared memory here")
def test_shared_memory_is_the_place_unless_told() -> None:
    folder = VersionFolder(None)
    assert folder.path.parent == Path("/dev/shm")
    folder.close()
