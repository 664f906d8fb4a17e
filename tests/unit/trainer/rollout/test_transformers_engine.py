"""Sampling against plain forward passes, against transformers' own greedy decoding, and against the clock of events."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from opd.types import FinishReason, Rollout
from services.trainer.rollout.base import RolloutRequest, SamplingParams
from tests.unit.trainer.rollout.tiny_students import (
    DEFINED,
    EOS,
    TOLERANCE,
    VOCAB,
    assert_recorded_exactly,
    engine,
    full_logprobs,
    qwen,
    requests,
    sharpen,
)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_is_recorded_equals_a_full_forward_pass(temperature: float) -> None:
    model = qwen()
    found = engine(model).sample(requests(12), SamplingParams(temperature=temperature, max_response_tokens=30))
    assert len({rollout.prompt_token_ids.size for rollout in found}) > 8
    assert len({rollout.response_token_ids.size for rollout in found}) > 4
    for rollout in found:
        assert_recorded_exactly(model, rollout, temperature)
        np.testing.assert_array_equal(rollout.rollout_logprobs, rollout.sampled_logprobs)
        assert rollout.topk_token_ids.shape == (rollout.response_token_ids.size, 5)
        assert rollout.response_token_ids.max() < DEFINED and rollout.topk_token_ids.max() < DEFINED
        types = [rollout.response_token_ids, rollout.topk_token_ids, rollout.topk_logprobs, rollout.entropy]
        assert [array.dtype for array in types] == [np.int32, np.int32, np.float32, np.float32]


def test_rollout_logprobs_are_those_of_the_cut_distribution() -> None:
    model = qwen()
    sampling = SamplingParams(temperature=0.8, top_p=0.7, top_k=6, max_response_tokens=20)
    for rollout in engine(model).sample(requests(6), sampling):
        assert_recorded_exactly(model, rollout, 0.8)
        expected = np.exp(full_logprobs(model, rollout, 0.8))
        for row, token in enumerate(rollout.response_token_ids):
            order = np.argsort(-expected[row], kind="stable")[:6]
            top = expected[row][order]
            kept = 1 + int(np.searchsorted(np.cumsum(top), 0.7 * top.sum(), side="left"))
            assert token in order[:kept]
            log_probability = np.log(expected[row][token] / top[:kept].sum())
            assert rollout.rollout_logprobs[row] == pytest.approx(log_probability, abs=TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_greedy_equals_generate(attention: str, num_key_value_heads: int) -> None:
    model = qwen(num_key_value_heads=num_key_value_heads, attn_implementation=attention)
    wanted = requests(9)
    found = engine(model, num_defined_ids=VOCAB, max_slots=4).sample(
        wanted, SamplingParams(temperature=0, max_response_tokens=25)
    )
    for request, rollout in zip(wanted, found, strict=True):
        prompt = torch.from_numpy(request.prompt_token_ids.astype(np.int64))[None]
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=25,
            do_sample=False,
            eos_token_id=list(EOS),
            pad_token_id=0,
        )
        np.testing.assert_array_equal(rollout.response_token_ids, expected[0, prompt.shape[1] :].numpy())
        np.testing.assert_allclose(rollout.rollout_logprobs, 0.0, atol=1e-6)
        assert rollout.sampled_logprobs.max() < 0
    assert model.config._attn_implementation == attention


def sliding_qwen() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    return qwen(use_sliding_window=True, sliding_window=5, layer_types=kinds)


def sliding_mistral() -> Any:
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        sliding_window=6,
    )
    model = MistralForCausalLM(config).eval()
    sharpen(model)
    return model


@pytest.mark.parametrize("build", [sliding_qwen, sliding_mistral])
def test_windows_of_attention_are_kept(build: Any) -> None:
    model = build()
    for rollout in engine(model).sample(requests(6), SamplingParams(max_response_tokens=24)):
        assert_recorded_exactly(model, rollout)


def test_a_rollout_depends_on_its_seed_and_not_on_its_neighbours() -> None:
    model = qwen()
    sampling = SamplingParams(max_response_tokens=24)
    wanted = requests(10)
    together = engine(model).sample(wanted, sampling)
    again = engine(model).sample(wanted, sampling)
    few_slots = engine(model, max_slots=3, max_prefill_tokens=4).sample(wanted, sampling)
    alone = [engine(model).sample([request], sampling)[0] for request in wanted]
    backwards = engine(model).sample(wanted[::-1], sampling)[::-1]
    for rollout, *others in zip(together, again, few_slots, alone, backwards, strict=True):
        for other in others:
            np.testing.assert_array_equal(other.response_token_ids, rollout.response_token_ids)
            np.testing.assert_allclose(other.topk_logprobs, rollout.topk_logprobs, atol=TOLERANCE)
            assert other.rollout_id == rollout.rollout_id


def test_seeds_of_run_and_request_both_count() -> None:
    model = qwen()
    request = requests(1)[0]
    other = RolloutRequest(rollout_id="b", group=0, prompt_token_ids=request.prompt_token_ids, seed=request.seed + 1)
    texts = [
        tuple(engine(model).sample([one], SamplingParams(max_response_tokens=40, seed=seed))[0].response_token_ids)
        for one, seed in ((request, 0), (other, 0), (request, 1))
    ]
    assert len(set(texts)) == 3


def test_rollouts_of_one_prompt_share_its_prefill_and_differ() -> None:
    model = qwen()
    prompt = np.array([5, 9, 11, 30], np.int32)
    wanted = [RolloutRequest(rollout_id=str(i), group=0, prompt_token_ids=prompt, seed=i) for i in range(6)]
    calls: list[torch.Size] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    instance = engine(model)
    calls.clear()
    found = instance.sample(wanted, SamplingParams(max_response_tokens=20))
    hook.remove()
    assert calls[0] == (1, 3)
    assert all(shape[1] == 1 for shape in calls[1:])
    assert len({tuple(rollout.response_token_ids) for rollout in found}) > 3
    for rollout in found:
        assert_recorded_exactly(model, rollout)


def test_each_rollout_is_handed_over_before_the_others_end() -> None:
    model = qwen()
    events: list[str] = []
    hook = model.model.register_forward_hook(lambda *_: events.append("step"))
    instance = engine(model, max_slots=4)
    events.clear()
    handed: list[Rollout] = []

    def on_finish(rollout: Rollout) -> None:
        events.append(rollout.rollout_id)
        handed.append(rollout)

    returned = instance.sample(requests(10), SamplingParams(max_response_tokens=40), on_finish=on_finish)
    hook.remove()
    assert sorted(id(rollout) for rollout in handed) == sorted(id(rollout) for rollout in returned)
    assert [rollout.rollout_id for rollout in returned] == [f"run.0.{index}" for index in range(10)]
    ends = [index for index, event in enumerate(events) if event != "step"]
    assert events[-1] != "step"
    # Steps go on between the first hand-over and the last.
    assert events[ends[0] : ends[-1]].count("step") > 10


def test_slots_bound_the_batch_and_waiting_requests_refill_it() -> None:
    model = qwen()
    shapes: list[torch.Size] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    instance = engine(model, max_slots=4)
    shapes.clear()
    prompt = np.array([5, 9, 11], np.int32)
    wanted = [RolloutRequest(rollout_id=str(i), group=0, prompt_token_ids=prompt, seed=i) for i in range(17)]
    found = instance.sample(wanted, SamplingParams(max_response_tokens=30))
    hook.remove()
    widths = [shape[0] for shape in shapes if shape[1] == 1]
    # No row runs on after its end, none is run twice, and freed slots are used while requests wait.
    assert sum(widths) == sum(rollout.response_token_ids.size for rollout in found)
    assert max(widths) == 4
    last_full = len(widths) - 1 - widths[::-1].index(4)
    assert all(width == 4 for width in widths[: last_full + 1])


def test_an_eos_counts_as_a_position_and_the_limit_cuts_off() -> None:
    found = engine(qwen()).sample(requests(12), SamplingParams(max_response_tokens=16))
    reasons = {rollout.finish_reason for rollout in found}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    for rollout in found:
        is_eos = np.isin(rollout.response_token_ids, EOS)
        assert not is_eos[:-1].any()
        assert is_eos[-1] == (rollout.finish_reason is FinishReason.STOP)
        if rollout.finish_reason is FinishReason.LENGTH:
            assert rollout.response_token_ids.size == 16


def test_an_eos_at_the_limit_is_a_stop() -> None:
    model = qwen()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = 1.0
        model.model.norm.weight.fill_(1.0)
        model.model.norm.register_forward_hook(lambda *_: torch.ones_like(_[-1]))
    (found,) = engine(model).sample(requests(1), SamplingParams(temperature=0, max_response_tokens=1))
    assert (found.response_token_ids.tolist(), found.finish_reason) == ([1], FinishReason.STOP)


def test_recording_can_be_left_out() -> None:
    model = qwen()
    sampling = SamplingParams(max_response_tokens=12, top_p=0.9)
    plain = engine(model, score_top_k=None).sample(requests(4), sampling)
    for rollout, full in zip(plain, engine(model).sample(requests(4), sampling), strict=True):
        np.testing.assert_array_equal(rollout.response_token_ids, full.response_token_ids)
        count = rollout.response_token_ids.size
        assert rollout.topk_token_ids.shape == rollout.topk_logprobs.shape == (count, 0)
        for values in (rollout.rollout_logprobs, rollout.sampled_logprobs, rollout.entropy):
            assert values.shape == (count,) and np.isnan(values).all()


def test_log_probs_without_a_top_k() -> None:
    model = qwen()
    (rollout,) = engine(model, score_top_k=0).sample(requests(1), SamplingParams(max_response_tokens=6))
    assert rollout.topk_token_ids.shape[1] == 0
    assert_recorded_exactly(model, rollout)


def test_new_weights_are_sampled_and_the_version_is_stamped() -> None:
    model = qwen()
    model.train()
    instance = engine(model)
    before = instance.sample(requests(2), SamplingParams(max_response_tokens=10))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(7, dims=0))
    instance.policy_version = 3
    after = instance.sample(requests(2), SamplingParams(max_response_tokens=10))
    assert model.training
    assert [rollout.policy_version for rollout in (*before, *after)] == [0, 0, 3, 3]
    model.eval()
    for rollout in after:
        assert_recorded_exactly(model, rollout)
    assert any(
        not np.array_equal(a.response_token_ids, b.response_token_ids) for a, b in zip(before, after, strict=True)
    )


def test_training_goes_on_after_sampling() -> None:
    model = qwen().train()
    engine(model).sample(requests(2), SamplingParams(max_response_tokens=5))
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_layers_can_run_in_lower_precision() -> None:
    model = qwen()
    found = engine(model, autocast_dtype=torch.bfloat16).sample(requests(3), SamplingParams(max_response_tokens=8))
    for rollout in found:
        expected = full_logprobs(model, rollout, 1.0)
        rows = np.arange(rollout.response_token_ids.size)
        gap = np.abs(rollout.sampled_logprobs - expected[rows, rollout.response_token_ids]).max()
        assert 0 < gap < 0.5


def test_learned_positions_work_too() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    sharpen(model)
    for rollout in engine(model).sample(requests(5), SamplingParams(max_response_tokens=12)):
        assert_recorded_exactly(model, rollout)


def test_sampling_has_its_own_threads_and_leaves_the_rest_as_they_were() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    try:
        torch.set_num_threads(3)
        for num_threads in (1, 2, None):
            sampler = engine(qwen(), num_threads=num_threads)
            sampler.sample(requests(3), SamplingParams(max_response_tokens=4), on_finish=lambda _: seen.append(count()))
            assert count() == 3
        with pytest.raises(ZeroDivisionError):
            engine(qwen(), num_threads=1).sample(
                requests(1), SamplingParams(max_response_tokens=4), on_finish=lambda _: seen.append(1 // 0)
            )
        assert count() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def count() -> int:
    return torch.get_num_threads()
