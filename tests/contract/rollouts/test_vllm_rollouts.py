"""What vLLM samples, held to the protocol of rollout engines and to a float64 forward pass of the same weights."""

import numpy as np
import pytest

from opd.errors import ConfigError, InvalidRequestError, UnsupportedError
from opd.types import FinishReason, Rollout
from services.trainer.rollout.base import RolloutRequest, SamplingParams
from tests.contract.rollouts.conftest import EOS, MAX_CONTEXT, K, Stand, assert_exact, requests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_log_probs_are_the_models_at_the_sampling_temperature(stand: Stand, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, max_response_tokens=40)
    for rollout in stand.engine.sample(requests(6), sampling):
        assert rollout.topk_token_ids.shape == (rollout.response_token_ids.size, K)
        assert_exact(stand, stand.model, rollout, temperature)


def test_prompts_beyond_one_forward_pass_are_exact_too(stand: Stand) -> None:
    """40 prompts in 16 slots, of more tokens together than a pass takes."""
    rollouts = stand.engine.sample(requests(40, length=90), SamplingParams(max_response_tokens=20))
    for rollout in rollouts[::5] + rollouts[-1:]:
        assert_exact(stand, stand.model, rollout)


def test_rows_without_a_token_are_neither_sampled_nor_counted(hostile: Stand) -> None:
    rollouts = hostile.engine.sample(requests(8), SamplingParams(max_response_tokens=40))
    for rollout in rollouts:
        assert max(rollout.response_token_ids.max(), rollout.topk_token_ids.max()) < 90
        assert_exact(hostile, hostile.model, rollout)


def test_equal_ids_are_ranked_lower_id_first(hostile: Stand) -> None:
    tied = 0
    for rollout in hostile.engine.sample(requests(16, seed=3), SamplingParams(max_response_tokens=60)):
        for ids, logprobs in zip(rollout.topk_token_ids, rollout.topk_logprobs, strict=True):
            equal = np.diff(logprobs) == 0
            tied += int(equal.sum())
            assert (np.diff(ids)[equal] > 0).all() and (np.diff(logprobs) <= 0).all()
    assert tied > 10


def test_responses_end_by_eos_or_length(stand: Stand) -> None:
    rollouts = stand.engine.sample(requests(16, seed=1, num_ids=500), SamplingParams(max_response_tokens=45))
    reasons = {rollout.finish_reason for rollout in rollouts}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    for rollout in rollouts:
        is_eos = rollout.response_token_ids == EOS
        if rollout.finish_reason is FinishReason.STOP:
            assert is_eos[-1] and not is_eos[:-1].any()
        else:
            assert rollout.response_token_ids.size == 45 and not is_eos.any()


def same_prompt(*seeds: int) -> list[RolloutRequest]:
    prompt = np.array([5, 9, 20, 33], np.int32)
    return [
        RolloutRequest(rollout_id=f"run.0.{index}", group=0, prompt_token_ids=prompt, seed=seed)
        for index, seed in enumerate(seeds)
    ]


def test_seeds_tell_responses_apart_and_repeat_them(stand: Stand) -> None:
    sampling = SamplingParams(max_response_tokens=20, seed=5)
    first = [rollout.response_token_ids.tolist() for rollout in stand.engine.sample(same_prompt(1, 2, 3), sampling)]
    assert len({tuple(ids) for ids in first}) == 3
    alone = [stand.engine.sample(same_prompt(seed), sampling)[0].response_token_ids.tolist() for seed in (1, 2, 3)]
    assert alone == first
    (other,) = stand.engine.sample(same_prompt(1), SamplingParams(max_response_tokens=20, seed=6))
    assert other.response_token_ids.tolist() != first[0]


def test_sampling_follows_the_distribution(stand: Stand) -> None:
    """First tokens of 2,000 rollouts against the probabilities: chi-squared, whose mean is its degrees of freedom."""
    rollouts = stand.engine.sample(same_prompt(*range(2000)), SamplingParams(max_response_tokens=1))
    probabilities = np.exp(rollouts[0].topk_logprobs[0].astype(np.float64))
    ids = rollouts[0].topk_token_ids[0]
    counts = np.array([sum(int(rollout.response_token_ids[0] == token) for rollout in rollouts) for token in ids])
    observed = np.append(counts, 2000 - counts.sum())
    expected = 2000 * np.append(probabilities, 1 - probabilities.sum())
    kept = expected > 5
    statistic = float(((observed - expected)[kept] ** 2 / expected[kept]).sum())
    assert kept.sum() >= 3
    assert statistic < kept.sum() + 6 * np.sqrt(2 * kept.sum())


def test_each_is_handed_over_when_it_ends_and_all_are_returned_in_order(stand: Stand) -> None:
    asked = requests(12, seed=1, num_ids=500)
    handed: list[Rollout] = []
    returned = stand.engine.sample(asked, SamplingParams(max_response_tokens=60), on_finish=handed.append)
    assert [rollout.rollout_id for rollout in returned] == [request.rollout_id for request in asked]
    assert sorted(map(id, handed)) == sorted(map(id, returned))
    lengths = [rollout.response_token_ids.size for rollout in handed]
    # They all began at the same time, in as many slots, so the shorter ended earlier.
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_an_error_of_the_receiver_passes_through_and_leaves_nothing_behind(stand: Stand) -> None:
    sampling = SamplingParams(max_response_tokens=60)
    asked = requests(12, seed=1, num_ids=500)
    expected = stand.engine.sample(asked, sampling)

    def refuse(rollout: Rollout) -> None:
        raise LookupError(rollout.rollout_id)

    with pytest.raises(LookupError, match=r"run\.0\."):
        stand.engine.sample(asked, sampling, on_finish=refuse)
    again = stand.engine.sample(asked, sampling)
    assert [rollout.response_token_ids.tolist() for rollout in again] == [
        rollout.response_token_ids.tolist() for rollout in expected
    ]


def test_without_recording_a_cut_distribution_is_sampled(stand: Stand) -> None:
    engine = stand.evaluation_engine()
    (rollout,) = engine.sample(same_prompt(1), SamplingParams(temperature=0.7, top_p=0.9, max_response_tokens=8))
    assert rollout.topk_token_ids.shape == (rollout.response_token_ids.size, 0)
    assert np.isnan(rollout.sampled_logprobs).all() and np.isnan(rollout.rollout_logprobs).all()
    greedy = engine.sample(same_prompt(1, 2), SamplingParams(temperature=0, max_response_tokens=8))
    assert greedy[0].response_token_ids.tolist() == greedy[1].response_token_ids.tolist()
    # The most likely continuation, as the recording engine ranks it.
    recorded = stand.engine.sample(same_prompt(1), SamplingParams(temperature=0, max_response_tokens=8))[0]
    assert recorded.response_token_ids.tolist() == recorded.topk_token_ids[:, 0].tolist()
    assert_exact(stand, stand.model, recorded)


def test_it_says_where_it_samples(stand: Stand) -> None:
    assert stand.engine.samples_elsewhere and stand.engine.max_context == MAX_CONTEXT


@pytest.mark.parametrize(
    ("sampling", "prompt", "error", "message"),
    [
        (SamplingParams(top_p=0.9, max_response_tokens=4), [5], UnsupportedError, r"top_p=0\.9.*keep every token"),
        (SamplingParams(top_k=9, max_response_tokens=4), [5], UnsupportedError, r"top_k=9.*keep every token"),
        (SamplingParams(temperature=-1), [5], ConfigError, r"sampling\.temperature: -1"),
        (SamplingParams(max_response_tokens=4), [], InvalidRequestError, r"run\.0\.0: prompt_token_ids has shape"),
        (SamplingParams(max_response_tokens=4), [512], InvalidRequestError, r"has id 512, outside 0\.\.511"),
        (SamplingParams(max_response_tokens=120), [5], InvalidRequestError, r"need 121 of the student's 120"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(
    stand: Stand, sampling: SamplingParams, prompt: list[int], error: type[Exception], message: str
) -> None:
    request = RolloutRequest(rollout_id="run.0.0", group=0, prompt_token_ids=np.array(prompt, np.int32), seed=1)
    with pytest.raises(error, match=message):
        stand.engine.sample([request], sampling)
