"""The packed forward pass against one plain pass of the library for each document: the same states and gradients."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from services.trainer.batch import build_batch
from services.trainer.forward import DocumentForward
from services.trainer.packed_attention import inside_documents
from services.trainer.packing import PackedTokens, pack
from services.trainer.student import Student
from tests.unit.trainer.test_batch import scored
from tests.unit.trainer.tiny_training import NUM_IDS, in_float64, tiny_model

LENGTHS = (13, 12, 12, 9, 2, 5, 5, 1)
SIZES: dict[str, Any] = {
    "vocab_size": NUM_IDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}
PACKED = {
    "qwen3": lambda: tiny_model(3),
    "qwen3-tied": lambda: tiny_model(3, tie_word_embeddings=True),
    "qwen3-window": lambda: tiny_model(3, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)),
    "gemma2-window": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, sliding_window=5)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=NUM_IDS, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    ),
}
PADDED = {
    "eager": lambda: tiny_model(3, attn_implementation="eager"),
    "no-positions": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=NUM_IDS, hidden_size=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    ),
    "convolutions": lambda: Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])),
}


def made(build: Any) -> Any:
    torch.manual_seed(7)
    return build().eval()


def documents(lengths: tuple[int, ...] = LENGTHS) -> PackedTokens:
    generator = np.random.default_rng(1)
    ids_N = torch.from_numpy(generator.integers(0, NUM_IDS, sum(lengths)))
    return PackedTokens(input_ids_N=ids_N, lengths=lengths, hidden_index_T=torch.arange(len(ids_N)))


def alone(model: Any, tokens: PackedTokens) -> Tensor:
    """Independent: the library's own pass over one document at a time, without mask, positions or padding."""
    parts = tokens.input_ids_N.split(tokens.lengths)
    return torch.cat([model.base_model(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in parts])


def gradients(model: Any, hidden_NH: Tensor) -> list[Tensor]:
    """Of a sum in which every number has a weight of its own; of the tokens' layers alone, not of the head."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, hidden_NH.numel(), dtype=torch.float64).sin().view_as(hidden_NH)
    (hidden_NH * weights).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    """By norm, relative."""
    assert float((found - expected).detach().norm()) <= bound * float(expected.detach().norm()) + 1e-14


@pytest.mark.parametrize("is_double", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_a_document_has_the_states_and_gradients_it_has_alone(name: str, is_double: bool) -> None:
    model = made((PACKED | PADDED)[name])
    if is_double:
        model = in_float64(model)
    forward = DocumentForward(model, num_defined_ids=NUM_IDS)
    assert forward.is_packed is (name in PACKED)
    tokens, bound = documents(), 1e-10 if is_double else 1e-5
    found_NH, expected_NH = forward(tokens), alone(model, tokens)
    assert_close(found_NH, expected_NH, bound)
    pairs = list(zip(gradients(model, found_NH), gradients(model, expected_NH), strict=True))
    assert len(pairs) > 5
    for found, expected in pairs:
        assert_close(found, expected, bound)


def siblings() -> PackedTokens:
    """Two prompts, of three and of two responses, and one of a single response."""
    generator = np.random.default_rng(2)
    prompts = [generator.integers(0, NUM_IDS, size).tolist() for size in (7, 4, 6)]
    wanted = [(0, 6), (2, 5), (0, 3), (1, 6), (0, 3), (1, 1)]
    items = [
        scored(f"r{row}", prompts[prompt], generator.integers(0, NUM_IDS, size).tolist())
        for row, (prompt, size) in enumerate(wanted)
    ]
    return pack([item.rollout for item in items])


@pytest.mark.parametrize("is_double", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_a_prompt_of_several_documents_is_computed_once_and_is_what_it_is_alone(name: str, is_double: bool) -> None:
    model = made((PACKED | PADDED)[name])
    if is_double:
        model = in_float64(model)
    tokens, bound = siblings(), 1e-10 if is_double else 1e-5
    assert tokens.sharing is not None and len(tokens.sharing.kept_U) == 7 + 4 + 6 + 24
    found_NH, expected_NH = DocumentForward(model, num_defined_ids=NUM_IDS)(tokens), alone(model, tokens)
    assert_close(found_NH, expected_NH, bound)
    for found, expected in zip(gradients(model, found_NH), gradients(model, expected_NH), strict=True):
        assert_close(found, expected, bound)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 12, 13, 20])
def test_windows_of_any_length_are_those_of_the_library(window: int) -> None:
    model = in_float64(made(lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window))))
    forward = DocumentForward(model, num_defined_ids=NUM_IDS)
    assert forward.is_packed
    tokens = documents((26, 25, 12, 12, 3))
    assert_close(forward(tokens), alone(model, tokens), 1e-10)


def test_a_neighbour_that_is_seen_would_be_noticed() -> None:
    """The comparison has teeth: with other bounds between the documents states change."""
    model = in_float64(made(PACKED["llama"]))
    tokens = documents()
    other = PackedTokens(
        input_ids_N=tokens.input_ids_N, lengths=(25, *LENGTHS[2:]), hidden_index_T=tokens.hidden_index_T
    )
    difference_N = (DocumentForward(model, num_defined_ids=NUM_IDS)(other) - alone(model, tokens)).detach().norm(dim=1)
    assert difference_N[:13].max() < 1e-10 < 1e-3 < difference_N[13:25].min()


def test_the_order_of_documents_changes_nothing_for_any_of_them() -> None:
    model = in_float64(made(PACKED["qwen3"]))
    forward = DocumentForward(model, num_defined_ids=NUM_IDS)
    tokens = documents()
    parts = list(tokens.input_ids_N.split(tokens.lengths))
    states = forward(tokens).split(tokens.lengths)
    order = [5, 0, 7, 2, 1, 6, 4, 3]
    turned = PackedTokens(
        input_ids_N=torch.cat([parts[index] for index in order]),
        lengths=tuple(LENGTHS[index] for index in order),
        hidden_index_T=tokens.hidden_index_T,
    )
    for index, found in zip(order, forward(turned).split(turned.lengths), strict=True):
        assert_close(found, states[index], 1e-10)


def test_a_layer_that_keeps_its_window_to_itself_is_padded(caplog: pytest.LogCaptureFixture) -> None:
    """Short documents do not tell: they fit into the window either way."""
    model = made(lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=40)))
    assert DocumentForward(model, num_defined_ids=NUM_IDS).is_packed
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert not DocumentForward(model, num_defined_ids=NUM_IDS).is_packed
    assert "model_type=mistral is trained on padded groups instead of packed rows" in caplog.text


def test_a_model_that_ignores_positions_is_padded(caplog: pytest.LogCaptureFixture) -> None:
    model = made(PACKED["gpt2"])
    original = model.transformer.forward
    model.transformer.forward = lambda **inputs: original(**(inputs | {"position_ids": None}))
    forward = DocumentForward(model, num_defined_ids=NUM_IDS)
    assert not forward.is_packed and "with a neighbour in the row" in caplog.text
    tokens = documents()
    assert_close(forward(tokens), alone(model, tokens), 1e-5)


def test_the_model_is_left_as_it_was_also_by_an_error() -> None:
    model = tiny_model(3)
    config, tokens = model.config, documents()
    with pytest.raises(KeyError), inside_documents(config, tokens):
        assert config._attn_implementation == "sdpa_in_documents"
        raise KeyError
    assert config._attn_implementation == "sdpa"
    expected = alone(model, tokens)
    DocumentForward(model, num_defined_ids=NUM_IDS)(tokens)
    assert torch.equal(alone(model, tokens), expected) and not model.training


@pytest.mark.parametrize("name", ["llama", "eager", "convolutions"])
def test_layers_run_once_for_a_micro_batch_where_that_is_asked_for(name: str) -> None:
    """By a decoder of the caller's, as where several processes have to take every layer together."""
    model = in_float64(made((PACKED | PADDED)[name]))
    passes = []

    def decoder(**inputs: Any) -> Any:
        passes.append(inputs["input_ids"].shape)
        return model.base_model(**inputs)

    forward = DocumentForward(model, num_defined_ids=NUM_IDS, decoder=decoder, in_one_pass=True)
    passes.clear()
    tokens = documents()
    assert_close(forward(tokens), alone(model, tokens), 1e-10)
    assert passes == [(1, sum(LENGTHS)) if name == "llama" else (len(LENGTHS), max(LENGTHS))]
    padded = len(LENGTHS) * max(LENGTHS)
    assert tokens.num_places < padded
    assert forward.num_places(tokens) == (tokens.num_places if name in PACKED else padded)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest result of any operation, those of the way back included."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        tensors = [part for part in torch.utils._pytree.tree_leaves(found) if isinstance(part, Tensor)]
        # A view that repeats its numbers takes no memory for them.
        sizes = [tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in tensors]
        self.largest = max([self.largest, *sizes])
        return found


@pytest.mark.parametrize("name", ["qwen3", "mistral-window"])
def test_no_mask_of_all_tokens_with_all_others_exists(name: str) -> None:
    model = made(PACKED[name])
    forward = DocumentForward(model, num_defined_ids=NUM_IDS)
    tokens = documents((60, 58, 57, 50, *[40] * 20, *[30] * 50))
    num_tokens = len(tokens.input_ids_N)
    with LargestTensor() as seen:
        forward(tokens).sum().backward()
    # Keys and values of a window's blocks are held twice: 4 times 64 numbers a token is the most that there is.
    assert num_tokens * 32 < seen.largest < num_tokens * 256 < num_tokens**2 / 8


ITEMS = [
    scored(f"r{index}", [2 + index] * (1 + index % 3), [3 + index, *[5] * response], k=4)
    for index, response in enumerate((11, 10, 10, 7, 3, 0))
]


@pytest.mark.parametrize("way", ["sparse", "dense"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied", "qwen3-window", "eager", "convolutions"])
def test_recomputed_layers_give_the_same_gradients(name: str, way: str) -> None:
    """Together with packing and with the output head at a few ids; in float64."""
    found = []
    for is_recomputed, is_packed_together in itertools.product((False, True), repeat=2):
        model = in_float64(made((PACKED | PADDED)[name]))
        student = Student(model, num_defined_ids=NUM_IDS, gradient_checkpointing=is_recomputed)
        for part in [ITEMS] if is_packed_together else [[item] for item in ITEMS]:
            batch = build_batch(part)
            if way == "sparse":
                scores_TK = student.support_logits(batch, batch.support_ids_TK).log_softmax(dim=-1)
            else:
                scores_TK = student.scores(batch, batch.support_ids_TK).logprobs_TK
            (scores_TK * torch.arange(1, 5).double().sqrt()).sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    for other in found[1:]:
        assert_close(other, found[0], 1e-10)


class SavedBytes:
    """Bytes of distinct storages that autograd keeps for the way back, while it is entered."""

    def __enter__(self) -> "SavedBytes":
        self._storages: dict[int, Any] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _keep(self, tensor: Tensor) -> Tensor:
        # Held, so that no address is given out twice.
        self._storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def test_recomputing_layers_keeps_a_fraction_of_the_memory() -> None:
    kept = {}
    for is_recomputed in (False, True):
        model = tiny_model(3, num_hidden_layers=6)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        student = Student(model, num_defined_ids=NUM_IDS, gradient_checkpointing=is_recomputed)
        batch = build_batch([scored(f"r{index}", [2] * 20, [3] * 80, k=4) for index in range(20)])
        with SavedBytes() as saved:
            student.support_logits(batch, batch.support_ids_TK)
        kept[is_recomputed] = saved.total - weights
    assert kept[True] < 0.2 * kept[False]
