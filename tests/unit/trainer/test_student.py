"""The student's forward pass against plain full-vocabulary logits, and its optimizer against PyTorch's own."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from opd.errors import CheckpointError, ConfigError
from services.trainer.batch import build_batch
from services.trainer.config import OptimSettings
from services.trainer.student import Student, StudentOptimizer
from tests.unit.trainer.test_batch import scored
from tests.unit.trainer.tiny_training import NUM_IDS, tiny_model

ITEMS = [scored("a", [5, 6, 7], [8, 9, 1], k=4), scored("b", [3], [4], k=4), scored("c", [2, 2], [3, 3, 3, 1], k=4)]


def expected_logprobs(model: Any, ids: torch.Tensor, temperature: float = 1.0, rows: int = NUM_IDS) -> torch.Tensor:
    """One rollout at a time, whole vocabulary, float64."""
    found = []
    for item in ITEMS:
        tokens = torch.tensor([[*item.rollout.prompt_token_ids.tolist(), *item.rollout.response_token_ids.tolist()]])
        logits = model(input_ids=tokens).logits[0, item.rollout.prompt_token_ids.size - 1 : -1, :rows]
        found.append((logits.double() / temperature).log_softmax(dim=-1))
    return torch.cat(found).gather(1, ids)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("row_chunk", [1, 3, 256])
def test_logprobs_equal_a_plain_forward(temperature: float, row_chunk: int) -> None:
    model = tiny_model(3)
    batch = build_batch(ITEMS)
    student = Student(model, num_defined_ids=NUM_IDS, temperature=temperature, row_chunk=row_chunk)
    found = student.scores(batch, batch.support_ids_TK).logprobs_TK
    expected = expected_logprobs(model, batch.support_ids_TK, temperature)
    assert (found.double() - expected).abs().max() < 1e-4
    # The gradient, too, through the padding and the chunks.
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    (found * weights).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    (expected_logprobs(model, batch.support_ids_TK, temperature) * weights).sum().backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert (gradient - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-6


def test_rows_without_a_token_take_no_part() -> None:
    model = tiny_model(3, vocab=NUM_IDS + 8)
    batch = build_batch(ITEMS)
    found = Student(model, num_defined_ids=NUM_IDS).scores(batch, batch.support_ids_TK).logprobs_TK
    expected = expected_logprobs(model, batch.support_ids_TK, rows=NUM_IDS)
    assert (found.double() - expected).abs().max() < 1e-4


def test_recomputing_layers_changes_nothing() -> None:
    batch = build_batch(ITEMS)
    gradients = []
    for gradient_checkpointing in (False, True):
        model = tiny_model(3)
        student = Student(model, num_defined_ids=NUM_IDS, gradient_checkpointing=gradient_checkpointing)
        student.scores(batch, batch.support_ids_TK).logprobs_TK.sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        assert model.training is gradient_checkpointing
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_dropout_is_off(gradient_checkpointing: bool) -> None:
    config = GPT2Config(vocab_size=NUM_IDS, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.5)
    model = GPT2LMHeadModel(config)
    batch = build_batch(ITEMS)
    student = Student(model, num_defined_ids=NUM_IDS, gradient_checkpointing=gradient_checkpointing)
    found = student.scores(batch, batch.support_ids_TK).logprobs_TK
    model.eval()
    assert (found.double() - expected_logprobs(model, batch.support_ids_TK)).abs().max() < 1e-4


def test_a_soft_cap_is_part_of_the_head() -> None:
    config = Gemma2Config(
        vocab_size=NUM_IDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    batch = build_batch(ITEMS)
    found = Student(model, num_defined_ids=NUM_IDS).scores(batch, batch.support_ids_TK).logprobs_TK
    assert (found.double() - expected_logprobs(model, batch.support_ids_TK)).abs().max() < 1e-4


def test_a_head_of_another_form_is_refused() -> None:
    model = BertForMaskedLM(
        BertConfig(vocab_size=NUM_IDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(ConfigError, match=r"^student\.model: BertForMaskedLM computes logits in a way not known here"):
        Student(model, num_defined_ids=NUM_IDS)


def test_the_optimizer_is_adamw_with_decay_on_matrices_only() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = StudentOptimizer(ours, OptimSettings(lr=0.1, weight_decay=0.5, max_grad_norm=1e9))
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.5}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=0.1,
        betas=(0.9, 0.999),
    )
    for step in range(3):
        inputs = torch.randn(5, 4)
        for model, update in ((ours, lambda step=step: optimizer.step(step)), (theirs, reference.step)):
            model.zero_grad()
            model(inputs).square().sum().backward()
            update()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_clipping_reports_the_norm_before_it() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer = StudentOptimizer(model, OptimSettings(max_grad_norm=1.0))
    assert optimizer.clip() == pytest.approx(5.0)
    assert model.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_the_learning_rate_rises_linearly_and_stays() -> None:
    model = nn.Linear(2, 1)
    optimizer = StudentOptimizer(model, OptimSettings(lr=1.0, warmup_steps=4))
    assert [optimizer.step(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_optimizer_state_survives_the_way_through_tensors() -> None:
    def train(model: nn.Module, optimizer: StudentOptimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            model.zero_grad()
            model(torch.randn(5, 4)).square().sum().backward()
            optimizer.step(step)

    torch.manual_seed(0)
    whole = nn.Linear(4, 3)
    first = StudentOptimizer(whole, OptimSettings(lr=0.1))
    train(whole, first, range(2))
    resumed = nn.Linear(4, 3)
    resumed.load_state_dict(whole.state_dict())
    second = StudentOptimizer(resumed, OptimSettings(lr=0.1))
    second.load_state_tensors({name: value.clone() for name, value in first.state_tensors().items()})
    train(whole, first, range(2, 5))
    train(resumed, second, range(2, 5))
    assert torch.equal(whole.weight, resumed.weight)


def test_the_state_of_another_model_is_refused() -> None:
    model = nn.Linear(4, 3)
    optimizer = StudentOptimizer(model, OptimSettings())
    with pytest.raises(CheckpointError, match=r"^optimizer state: other is no parameter of this student"):
        optimizer.load_state_tensors({"other.exp_avg": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"^optimizer state: weight\.exp_avg has another shape"):
        optimizer.load_state_tensors({"weight.exp_avg": torch.zeros(2, 2)})
