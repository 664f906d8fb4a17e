"""Choosing tokens: the distribution that comes out, its limits, and the numbers it is driven by."""

import numpy as np
import pytest
import torch

from services.trainer.rollout.base import SamplingParams, derive_seed
from services.trainer.rollout.token_choice import choose_tokens
from services.trainer.rollout.uniforms import stream_states, uniforms

LOGITS = [1.2, -0.3, 0.4, 2.0, 0.4, -1.5, 0.0, 1.1]
NUM_DRAWS = 40_000
# Upper 1e-6 quantiles of chi-square by degrees of freedom: a fixed seed that fails here is no accident.
CHI_SQUARE_LIMITS = {1: 23.9, 2: 27.6, 3: 30.7, 4: 33.4, 5: 35.9, 6: 38.3, 7: 40.5}


def expected_probabilities(temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """float64, straight from the definition: temperature, then the k largest, then the smallest set holding top_p."""
    weights = np.exp(np.array(LOGITS) / temperature)
    full = weights / weights.sum()
    order = sorted(range(len(LOGITS)), key=lambda index: (-full[index], index))
    if top_k > 0:
        order = order[:top_k]
    total = sum(full[index] for index in order)
    kept: list[int] = []
    while sum(full[index] for index in kept) < top_p * total - 1e-12:
        kept.append(order[len(kept)])
    cut = np.zeros_like(full)
    cut[kept] = full[kept]
    return cut / cut.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, -1), (0.5, 1.0, -1), (2.0, 1.0, -1), (1.0, 0.8, -1), (1.0, 1.0, 3), (0.7, 0.9, 5), (1.0, 0.01, -1)],
)
def test_frequencies_follow_the_cut_distribution(temperature: float, top_p: float, top_k: int) -> None:
    expected = expected_probabilities(temperature, top_p, top_k)
    logits = torch.tensor(LOGITS).expand(NUM_DRAWS, -1)
    states = stream_states(torch.full((NUM_DRAWS,), 17))
    choice = choose_tokens(
        logits,
        uniforms(states, torch.arange(NUM_DRAWS)),
        SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k),
    )
    counts = np.bincount(choice.token_ids_B.numpy(), minlength=len(LOGITS))
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    if kept.sum() > 1:
        statistic = ((counts[kept] - NUM_DRAWS * expected[kept]) ** 2 / (NUM_DRAWS * expected[kept])).sum()
        assert statistic < CHI_SQUARE_LIMITS[int(kept.sum()) - 1]
    full = expected_probabilities(temperature, 1.0, -1)
    np.testing.assert_allclose(choice.kept_log_mass_B.numpy(), np.log(full[kept].sum()), atol=1e-6)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    choice = choose_tokens(logits, torch.zeros(2, dtype=torch.float64), SamplingParams(temperature=0))
    assert choice.token_ids_B.tolist() == [1, 0]


def test_ties_at_a_limit_go_to_the_lower_id() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0]]).expand(1000, -1)
    draws = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)
    choice = choose_tokens(logits, draws, SamplingParams(top_k=2))
    assert set(choice.token_ids_B.tolist()) == {0, 1}


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(top_p=0.999), SamplingParams(top_k=4)])
def test_the_largest_uniform_never_reaches_a_token_without_mass(sampling: SamplingParams) -> None:
    logits = torch.tensor([[0.3, 0.1, 0.2, -200.0, -300.0]])
    highest = torch.tensor([1.0 - 2.0**-52], dtype=torch.float64)
    assert choose_tokens(logits, highest, sampling).token_ids_B.item() <= 2
    assert choose_tokens(logits, torch.zeros(1, dtype=torch.float64), sampling).token_ids_B.item() in (0, 1)


def test_a_large_vocabulary_keeps_its_rare_tokens() -> None:
    """In float32 the sum of 200,000 small masses would lose the last of them."""
    num_ids = 200_000
    draws = torch.tensor([(num_ids - 0.5) / num_ids, 0.5 / num_ids, 0.5], dtype=torch.float64)
    choice = choose_tokens(torch.zeros(3, num_ids), draws, SamplingParams())
    np.testing.assert_allclose(choice.token_ids_B.numpy(), [num_ids - 1, 0, num_ids // 2], atol=1)


def reference_uniform(seed: int, position: int) -> float:
    """SplitMix64 with Python's unbounded integers."""
    wrap = (1 << 64) - 1

    def mix(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & wrap
        return value ^ (value >> 31)

    gamma = 0x9E3779B97F4A7C15
    state = mix((seed + gamma) & wrap)
    return (mix((state + (position + 1) * gamma) & wrap) >> 12) / 2**52


def test_uniforms_equal_the_published_generator() -> None:
    seeds = [0, 1, 2**62, 2**63 - 1]
    positions = [0, 1, 5, 31_743]
    states = stream_states(torch.tensor(seeds))
    for position in positions:
        found = uniforms(states, torch.full((len(seeds),), position))
        assert found.tolist() == [reference_uniform(seed, position) for seed in seeds]


def test_the_first_number_of_the_generator_is_the_known_one() -> None:
    """SplitMix64 from state 0 starts with 0xE220A8397B1DCDAF."""
    (found,) = uniforms(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).tolist()
    assert found == (0xE220A8397B1DCDAF >> 12) / 2**52


def test_neighbouring_seeds_and_positions_are_uncorrelated() -> None:
    states = stream_states(torch.arange(2000))
    table = torch.stack([uniforms(states, torch.full((2000,), position)) for position in range(20)]).numpy()
    assert table.min() >= 0 and table.max() < 1
    assert abs(table.mean() - 0.5) < 5 / np.sqrt(12 * table.size)
    correlations = np.corrcoef(table)[np.triu_indices(20, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(2000)
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 5 / np.sqrt(table.size)


def test_derived_seeds_differ_and_fit_in_63_bits() -> None:
    seeds = {derive_seed(run, step, index) for run in range(3) for step in range(20) for index in range(20)}
    assert len(seeds) == 1200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3) != derive_seed(12, 3)
