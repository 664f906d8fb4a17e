"""The sampler against generation one row at a time, and its nucleus."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from testbed.architecture import Size, create_model
from testbed.sampling import Sampling, draw, sample
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


def test_rows_of_a_batch_match_rows_alone(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    # A tiny nucleus keeps the most likely token only, which makes sampling greedy.
    sampling = Sampling(top_p=1e-6, max_tokens=24, batch_rows=3)
    responses = sample(model, tokenizer, PROMPTS, sampling, 0)
    for prompt, response in zip(PROMPTS, responses, strict=True):
        expected = greedy(model, tokenizer, prompt, 24)
        ended = expected[-1] == tokenizer.eos_token_id
        assert response.text == tokenizer.decode(expected[:-1] if ended else expected)
        assert (response.num_tokens, response.truncated) == (len(expected), not ended)


def test_dropping_finished_rows_keeps_the_others(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    sampling = Sampling(max_tokens=48)
    responses = sample(model, tokenizer, PROMPTS * 8, sampling, 1)
    lengths = {response.num_tokens for response in responses}
    assert len(lengths) > 2
    for response in responses:
        assert len(response.entropies) == len(response.num_live) == response.num_tokens
        assert all(entropy >= -1e-6 for entropy in response.entropies)
        assert all(num_live >= 1 for num_live in response.num_live)
        assert response.truncated == (response.num_tokens == 48) or response.num_tokens == 48


def test_the_seed_decides(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    first, second, other = (sample(model, tokenizer, PROMPTS, Sampling(max_tokens=16), seed) for seed in (3, 3, 4))
    assert first == second != other


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    logits_BV = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)

    def shares(sampling: Sampling) -> list[float]:
        drawn = draw(logits_BV, sampling, generator)
        return (torch.bincount(drawn[:, 0], minlength=4) / len(drawn)).tolist()

    assert shares(Sampling()) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(Sampling(top_p=0.6)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(Sampling(top_p=0.49)) == [1, 0, 0, 0]
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert shares(Sampling(temperature=0.5)) == pytest.approx((squares / squares.sum()).tolist(), abs=0.03)
