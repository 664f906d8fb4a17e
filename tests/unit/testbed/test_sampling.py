"""What is said of a sampled response, against the model's own distribution in float64."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from services.trainer.rollout.base import SamplingParams
from testbed.architecture import MAX_CONTEXT_TOKENS, Size, create_model
from testbed.sampling import LIVE_PROBABILITY, sample
from testbed.tokenizer import prompt_text, train_tokenizer

TINY = Size(hidden=32, layers=2, heads=2, key_value_heads=1, intermediate=48, dtype=torch.float32, head_dim=16)
PROMPTS = ["What is 4+5?", "Find 47+38-12. Please.", "7", "Work out 12+12+12+12+12.", "1+1 = ?"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(PROMPTS * 20)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    model = create_model(TINY, tokenizer, 0)
    # Sharp logits, and an end token that is likely enough for rows to end at different lengths.
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    with torch.no_grad():
        model.lm_head.weight[20:].zero_()
    return model


def greedy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, limit: int) -> list[int]:
    ids = tokenizer(prompt_text(prompt))["input_ids"]
    start = len(ids)
    with torch.inference_mode():
        while len(ids) < start + limit and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


def test_text_and_length_leave_the_end_out(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    sampling = SamplingParams(temperature=0, max_response_tokens=24)
    for prompt, response in zip(PROMPTS, sample(model, tokenizer, PROMPTS, sampling), strict=True):
        expected = greedy(model, tokenizer, prompt, 24)
        ended = expected[-1] == tokenizer.eos_token_id
        assert response.text == tokenizer.decode(expected[:-1] if ended else expected)
        assert (response.num_tokens, response.truncated) == (len(expected), not ended)


def test_entropy_and_live_tokens_are_the_models(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    (response,) = sample(model, tokenizer, PROMPTS[:1], SamplingParams(temperature=0, max_response_tokens=8))
    ids = tokenizer(prompt_text(PROMPTS[0]))["input_ids"]
    taken = greedy(model, tokenizer, PROMPTS[0], 8)
    with torch.inference_mode():
        logits_TV = model(input_ids=torch.tensor([ids + taken[:-1]])).logits[0, len(ids) - 1 :].double()
    probs_TV = torch.softmax(logits_TV, dim=-1)
    assert response.entropies == pytest.approx((-(probs_TV * probs_TV.log()).sum(-1)).tolist(), abs=1e-4)
    assert response.num_live == tuple((probs_TV > LIVE_PROBABILITY).sum(-1).tolist())


def test_a_limit_beyond_the_context_gives_way(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    long = "12+" * 330
    room = MAX_CONTEXT_TOKENS - len(tokenizer(prompt_text(long))["input_ids"])
    assert 0 < room < 64
    (response,) = sample(model, tokenizer, [long], SamplingParams(max_response_tokens=64))
    assert response.num_tokens <= room


def test_the_seed_decides(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    first, second, other = (
        sample(model, tokenizer, PROMPTS, SamplingParams(max_response_tokens=16, seed=seed)) for seed in (3, 3, 4)
    )
    assert first == second != other
