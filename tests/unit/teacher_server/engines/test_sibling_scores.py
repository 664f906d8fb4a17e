"""Rollouts of one prompt share its computation, and nobody can tell from their scores."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from opd.errors import NonFiniteError
from opd.types import ScoreRequest, Scores
from services.teacher_server.engines.base import ForwardReport
from services.teacher_server.engines.transformers_engine import EngineLimits, TransformersEngine, load_engine
from tests.unit.teacher_server.tiny_teachers import (
    NUM_DEFINED_IDS,
    make_request,
    random_ids,
    reference_scores,
    save_tiny_teacher,
    save_tokenizer,
)

PROMPT = random_ids(np.random.default_rng(7), 80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture
def reports() -> list[ForwardReport]:
    return []


@pytest.fixture
def engine(folder: Path, reports: list[ForwardReport]) -> TransformersEngine:
    return load(folder, reports)


def load(folder: Path, reports: list[ForwardReport], **limits: int) -> TransformersEngine:
    return load_engine(
        str(folder), teacher="tiny", device="cpu", dtype="float32", max_context=0, limits=EngineLimits(**limits),
        observe=reports.append,
    )  # fmt: skip


def sibling(seed: int, num_response: int, **changes: object) -> ScoreRequest:
    plain = make_request(seed, num_response=num_response, prompt_token_ids=PROMPT, **changes)
    candidates = random_ids(np.random.default_rng(seed + 50), num_response, 3)
    return replace(plain, candidate_token_ids=candidates, score_top_k=5, wants_entropy=True)


def check(engine: TransformersEngine, folder: Path, *requests: ScoreRequest) -> None:
    for request, found in zip(requests, engine.score(requests), strict=True):
        assert isinstance(found, Scores), found
        expected = reference_scores(folder, request)
        for name in ("sampled_logprobs", "candidate_logprobs", "topk_token_ids", "topk_logprobs", "entropy"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=0, err_msg=name)


def test_siblings_in_one_batch_compute_their_prompt_once(
    engine: TransformersEngine, folder: Path, reports: list[ForwardReport]
) -> None:
    """Responses of one and of several lengths, one of a single token, and a stranger among them."""
    requests = [sibling(seed, num_response) for seed, num_response in enumerate((9, 1, 9, 20))]
    stranger = replace(sibling(9, 5), prompt_token_ids=PROMPT[::-1].copy())
    check(engine, folder, *requests[:2], stranger, *requests[2:])
    assert sum(report.num_tokens for report in reports) == 80 + (8 + 0 + 8 + 19) + (80 + 4)
    assert sum(report.num_reused_tokens for report in reports) == 4 * 80


def test_a_later_sibling_continues_what_an_earlier_one_left(
    engine: TransformersEngine, folder: Path, reports: list[ForwardReport]
) -> None:
    check(engine, folder, sibling(1, 6))
    assert [report.num_reused_tokens for report in reports] == [0]
    check(engine, folder, sibling(2, 8))
    assert [(report.num_reused_tokens, report.num_tokens) for report in reports[1:]] == [(80, 7)]


def test_short_prompts_stay_in_the_common_rectangle(engine: TransformersEngine, reports: list[ForwardReport]) -> None:
    prompt = PROMPT[:10]
    engine.score([make_request(seed, prompt_token_ids=prompt, num_response=9) for seed in range(4)])
    assert [(report.num_requests, report.num_reused_tokens) for report in reports] == [(4, 0)]


def test_batch_invariant_requests_neither_use_nor_leave_a_prompt(
    engine: TransformersEngine, folder: Path, reports: list[ForwardReport]
) -> None:
    exact = [sibling(seed, 6, batch_invariant=True) for seed in (1, 1)]
    first, second = engine.score(exact)
    assert isinstance(first, Scores) and isinstance(second, Scores)
    np.testing.assert_array_equal(first.sampled_logprobs, second.sampled_logprobs)
    check(engine, folder, sibling(3, 5))
    third = engine.score(exact[:1])[0]
    assert isinstance(third, Scores)
    np.testing.assert_array_equal(first.sampled_logprobs, third.sampled_logprobs)
    assert sum(report.num_reused_tokens for report in reports) == 0


def test_a_cache_of_nothing_shares_nothing(folder: Path, reports: list[ForwardReport]) -> None:
    check(load(folder, reports, prefix_cache_tokens=0), folder, sibling(1, 6), sibling(2, 6))
    assert [(report.num_requests, report.num_reused_tokens) for report in reports] == [(2, 0)]


def test_sliding_windows_are_not_shared(tmp_path: Path, reports: list[ForwardReport]) -> None:
    config = Gemma2Config(
        vocab_size=NUM_DEFINED_IDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, sliding_window=8,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    save_tokenizer(tmp_path / "gemma")
    check(load(tmp_path / "gemma", reports), tmp_path / "gemma", sibling(1, 6), sibling(2, 6))
    assert sum(report.num_reused_tokens for report in reports) == 0


def test_passes_side_by_side_share_prompts_as_well(
    engine: TransformersEngine, folder: Path, reports: list[ForwardReport]
) -> None:
    """Enough tokens for two threads: siblings, strangers and one that is scored alone, twice over."""
    requests = [sibling(seed, 16) for seed in range(6)]
    requests += [replace(sibling(20 + start, 20), prompt_token_ids=PROMPT[start : start + 30]) for start in range(10)]
    requests.append(sibling(40, 6, batch_invariant=True))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            check(engine, folder, *requests)
    finally:
        torch.set_num_threads(before)
        engine.close()
    assert len(reports) > 12
    assert sum(report.num_reused_tokens for report in reports) == 2 * 6 * 80


def test_a_broken_token_in_a_response_is_that_siblings_fault_alone(
    tmp_path: Path, reports: list[ForwardReport]
) -> None:
    folder = save_tiny_teacher(tmp_path / "broken", nan_token=NUM_DEFINED_IDS - 1)
    engine = load(folder, reports)
    whole, broken = sibling(1, 6), sibling(2, 6)
    broken.response_token_ids[2] = NUM_DEFINED_IDS - 1
    prompt = np.where(PROMPT == NUM_DEFINED_IDS - 1, 1, PROMPT).astype(np.int32)
    outcomes = engine.score([replace(request, prompt_token_ids=prompt) for request in (broken, whole, broken)])
    assert [type(outcome) for outcome in outcomes] == [NonFiniteError, Scores, NonFiniteError]
    assert sum(report.num_reused_tokens for report in reports) == 3 * 80
