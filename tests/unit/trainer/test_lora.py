"""Adapters: trained alone, sampled through, saved in peft's own form, exact for a resume, refused where they fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from opd.errors import CheckpointError, ConfigError
from opd.settings import check_settings
from services.trainer.batch import build_batch
from services.trainer.checkpoint import CheckpointStore, TrainerState
from services.trainer.config import OptimSettings, TrainSettings
from services.trainer.lora import ADAPTER, Adapter, plain_weights
from services.trainer.lora_config import LoraSettings
from services.trainer.rollout.base import RolloutRequest, SamplingParams
from services.trainer.student import StudentOptimizer
from services.trainer.student_start import adapted, open_student
from tests.unit.trainer.tiny_training import FixedPrompts, Setup, tiny_model, tiny_tokenizer

SETTINGS = LoraSettings(rank=3, alpha=6.0, target_modules=("q_proj", "v_proj", "down_proj"))
OPTIM = OptimSettings(lr=2e-2, max_grad_norm=10.0)
IDS = torch.arange(2, 12)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_model(1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run_settings(base: Path, **lora: Any) -> TrainSettings:
    student = {"model": str(base), "device": "cpu", "lora": SETTINGS.model_dump() | lora}
    return check_settings(TrainSettings, {"student": student, "data": {"files": ["prompts.jsonl"]}})


def trained(base: Path, num_steps: int) -> tuple[Setup, Adapter]:
    torch.manual_seed(0)
    loaded, adapter = open_student(run_settings(base), None)
    assert adapter is not None
    setup = Setup(student_model=loaded.model, optim=OPTIM, num_steps=num_steps)
    loop = setup.loop()
    loop.run(lambda record: None)
    return setup, adapter


def save(folder: Path, setup: Setup, adapter: Adapter, step: int) -> Path:
    state = TrainerState(step=step, seed=0, prompts_digest="d", config={})
    store = CheckpointStore(folder, keep_last=2)
    tensors = setup.optimizer.state_tensors()
    return store.save(setup.student_model, tiny_tokenizer(), tensors, state, **adapted(setup.student_model, adapter))


def test_adapters_alone_are_trained_and_the_student_learns(base: Path) -> None:
    torch.manual_seed(0)
    loaded, _ = open_student(run_settings(base), None)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    setup = Setup(student_model=loaded.model, optim=OPTIM, num_steps=12)
    losses: list[float] = []
    setup.loop().run(lambda record: losses.append(record.losses["loss/objective"].value))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    changed = {name for name, value in loaded.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".lora_" in name for name in changed)
    # Not even a gradient: the output head's would be as large as the head.
    assert loaded.model.get_output_embeddings().weight.grad is None
    assert all(".lora_" in name for name in setup.optimizer.state_tensors())


def test_rollouts_are_sampled_from_the_adapted_student(base: Path) -> None:
    """Log-probs recorded while sampling are those of the training pass at the same weights."""
    setup, _ = trained(base, 4)
    prompt = FixedPrompts(1).step_prompts(0)[0].prompt_token_ids
    request = RolloutRequest(rollout_id="r.0.0", group=0, prompt_token_ids=prompt, seed=5)
    (rollout,) = setup.engine.sample([request], SamplingParams(max_response_tokens=12))
    ids = torch.tensor([[*prompt.tolist(), *rollout.response_token_ids.tolist()]])
    with torch.no_grad():
        rows = setup.student_model(input_ids=ids).logits[0, prompt.size - 1 : -1].log_softmax(dim=-1)
        untrained = tiny_model(1)(input_ids=ids).logits[0, prompt.size - 1 : -1].log_softmax(dim=-1)
    sampled = torch.from_numpy(rollout.response_token_ids).long()[:, None]
    found = torch.from_numpy(rollout.sampled_logprobs)
    assert torch.allclose(found, rows.gather(1, sampled)[:, 0], atol=1e-4)
    assert not torch.allclose(found, untrained.gather(1, sampled)[:, 0], atol=1e-2)


def test_a_checkpoint_is_a_plain_model_with_the_adapter_beside(base: Path, tmp_path: Path) -> None:
    setup, adapter = trained(base, 3)
    folder = save(tmp_path / "run", setup, adapter, 3)
    with torch.no_grad():
        expected = setup.student_model(IDS).logits
        untrained = tiny_model(1)(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(folder)
        standard = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / ADAPTER)
        assert torch.allclose(merged(IDS).logits, expected, atol=1e-4)
        assert torch.allclose(standard(IDS).logits, expected, atol=1e-5)
    assert not torch.allclose(expected, untrained, atol=1e-2)
    assert {path.name for path in (folder / ADAPTER).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_resumed_run_is_the_uninterrupted_one(base: Path, tmp_path: Path) -> None:
    whole, _ = trained(base, 4)
    setup, adapter = trained(base, 2)
    save(tmp_path / "run", setup, adapter, 2)
    checkpoint = CheckpointStore(tmp_path / "run", keep_last=2).latest()
    assert checkpoint is not None
    torch.manual_seed(99)
    loaded, _ = open_student(run_settings(base), checkpoint)
    resumed = Setup(student_model=loaded.model, optim=OPTIM, num_steps=4, first_step=2)
    resumed.optimizer.load_state_tensors(checkpoint.optimizer_tensors())
    resumed.loop().run(lambda record: None)
    assert torch.equal(resumed.parameters(), whole.parameters())


def test_plain_weights_are_those_of_a_model_without_adapters(base: Path) -> None:
    setup, _ = trained(base, 2)
    weights = dict(plain_weights(setup.student_model))
    plain = tiny_model(7)
    plain.load_state_dict(weights)
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, setup.student_model(IDS).logits, atol=1e-4)
    assert dict(plain_weights(plain)).keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"dropout": 0.1}, r"student\.lora\.dropout.*the loss would be of another distribution"),
        ({"target_modules": []}, r"student\.lora\.target_modules.*nothing would be trained"),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            r"target_modules.*lm_head is no layer of the decoder",
        ),
        ({"rank": 0}, r"student\.lora\.rank"),
    ],
)
def test_settings_that_make_no_sense(base: Path, lora: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        run_settings(base, **lora)


def test_a_moving_average_of_all_weights_is_refused(base: Path) -> None:
    values = {
        "student": {"model": str(base), "lora": {}},
        "data": {"files": ["prompts.jsonl"]},
        "teacher": {"kind": "self", "ema_decay": 0.9},
    }
    with pytest.raises(ConfigError, match=r"student\.lora with teacher\.ema_decay=0\.9"):
        check_settings(TrainSettings, values)


def test_a_layer_that_the_student_does_not_have(base: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"target_modules: c_attn is no linear layer of Qwen3ForCausalLM; it has down_p"
    ):
        open_student(run_settings(base, target_modules=["c_attn"]), None)


def test_a_resume_with_other_settings(base: Path, tmp_path: Path) -> None:
    setup, adapter = trained(base, 1)
    folder = save(tmp_path / "run", setup, adapter, 1)
    checkpoint = CheckpointStore(tmp_path / "run", keep_last=2).latest()
    with pytest.raises(CheckpointError, match=r"was trained with student\.lora\.rank=3, not 4; resume with the same"):
        open_student(run_settings(base, rank=4), checkpoint)
    (folder / ADAPTER / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: cannot be read"):
        open_student(run_settings(base), checkpoint)


def test_the_gradient_of_an_adapter_is_exact(base: Path) -> None:
    """By the chain rule from the gradient of the merged weight: dB = s dW A^T, dA = s B^T dW."""
    setup, _ = trained(base, 2)
    setup.engine.policy_version = 0
    items = setup.loop().run_step().scored
    setup.student_model.zero_grad()
    setup.loss(build_batch(items)).loss_sum.backward()
    full = tiny_model(7)
    full.load_state_dict(dict(plain_weights(setup.student_model)))
    other = Setup(student_model=full, optim=OPTIM)
    other.loss(build_batch(items)).loss_sum.backward()
    layer = setup.student_model.base_model.layers[1].mlp.down_proj
    gradient = full.base_model.layers[1].mlp.down_proj.weight.grad
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scale = SETTINGS.alpha / SETTINGS.rank
    assert torch.allclose(up.grad, scale * gradient @ down.T, rtol=1e-3, atol=1e-4)
    assert torch.allclose(down.grad, scale * up.T @ gradient, rtol=1e-3, atol=1e-4)
    assert StudentOptimizer(setup.student_model, OPTIM).clip() > 0
