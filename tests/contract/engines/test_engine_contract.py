"""What every engine keeps: exact values, NaN where nothing was to be scored, refusals of what it does not supply."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from opd.errors import UnsupportedError
from opd.types import Capability, ScoreRequest, Scores
from services.teacher_server.engines.base import ScoringEngine
from services.teacher_server.request_checks import check_request
from tests.contract.engines.conftest import MAX_BATCHED_TOKENS, STUDENT_BASE, load
from tests.unit.teacher_server.tiny_teachers import make_request, random_ids, reference_scores

TOLERANCE = 1e-3
NEEDS: dict[Capability, dict[str, Any]] = {
    Capability.SAMPLED_LOGPROBS: {"wants_sampled": True},
    Capability.CANDIDATE_LOGPROBS: {"candidate_token_ids": random_ids(np.random.default_rng(3), 7, 4)},
    Capability.TEACHER_TOP_K: {"score_top_k": 4},
    Capability.ENTROPY: {"wants_entropy": True},
    Capability.TEACHER_TEMPERATURE: {"teacher_temperature": 0.7},
    Capability.BATCH_INVARIANT: {"batch_invariant": True},
}


def scores_of(engine: ScoringEngine, *requests: ScoreRequest) -> list[Scores]:
    for request in requests:
        check_request(request, engine.info())
    outcomes = engine.score(requests)
    assert all(isinstance(outcome, Scores) for outcome in outcomes), outcomes
    return outcomes  # type: ignore[return-value]


def assert_exact(found: Scores, request: ScoreRequest, num_ids: int) -> None:
    expected = reference_scores(STUDENT_BASE, request, num_ids)
    assert found.sampled_logprobs is not None and found.sampled_logprobs.dtype == np.float32
    np.testing.assert_allclose(found.sampled_logprobs, expected.sampled_logprobs, atol=TOLERANCE)
    np.testing.assert_array_equal(found.topk_token_ids, expected.topk_token_ids)
    np.testing.assert_allclose(found.topk_logprobs, expected.topk_logprobs, atol=TOLERANCE)


@pytest.mark.parametrize(("num_prompt", "num_response"), [(1, 1), (1, 40), (40, 1), (30, 90)])
def test_sampled_and_top_k_are_those_of_a_float64_forward(
    engine: ScoringEngine, num_prompt: int, num_response: int
) -> None:
    request = make_request(1, num_prompt=num_prompt, num_response=num_response, score_top_k=8)
    (found,) = scores_of(engine, request)
    assert_exact(found, request, engine.info().num_defined_ids)
    assert found.candidate_logprobs is None and found.entropy is None


def test_a_request_may_fill_the_context_and_exceed_a_forward_pass(engine: ScoringEngine) -> None:
    max_context = engine.info().max_context
    assert max_context > 2 * MAX_BATCHED_TOKENS
    request = make_request(2, num_prompt=100, num_response=max_context - 100, score_top_k=3)
    neighbour = make_request(3, num_prompt=20, num_response=300, score_top_k=3)
    found = scores_of(engine, request, neighbour)
    assert_exact(found[0], request, engine.info().num_defined_ids)
    assert_exact(found[1], neighbour, engine.info().num_defined_ids)


def test_top_k_may_be_as_large_as_the_engine_says(engine: ScoringEngine) -> None:
    request = make_request(4, score_top_k=engine.info().max_score_top_k)
    (found,) = scores_of(engine, request)
    expected = reference_scores(STUDENT_BASE, request, engine.info().num_defined_ids)
    np.testing.assert_allclose(found.topk_logprobs, expected.topk_logprobs, atol=TOLERANCE)


def test_unscored_rows_are_nan_and_the_others_unchanged(engine: ScoringEngine) -> None:
    scored_R = np.array([True, False, True, True, False, False, True])
    request = make_request(5, score_top_k=3)
    (whole,) = scores_of(engine, request)
    (masked,) = scores_of(engine, dataclasses.replace(request, scored_rows=scored_R))
    for name in ("sampled_logprobs", "topk_logprobs"):
        values_R, whole_R = getattr(masked, name), getattr(whole, name)
        np.testing.assert_allclose(values_R[scored_R], whole_R[scored_R], atol=1e-5)
        assert np.isnan(values_R[~scored_R]).all()
    assert masked.topk_token_ids is not None and (masked.topk_token_ids[~scored_R] == -1).all()


def test_only_what_was_asked_for_comes_back(engine: ScoringEngine) -> None:
    request = make_request(6, score_top_k=2, wants_sampled=False)
    (found,) = scores_of(engine, request)
    assert found.sampled_logprobs is None and found.topk_token_ids is not None
    (found,) = scores_of(engine, make_request(6))
    assert found.sampled_logprobs is not None and found.topk_token_ids is None and found.topk_logprobs is None


def test_scores_do_not_depend_on_neighbours_or_order(engine: ScoringEngine) -> None:
    requests = [make_request(seed, num_prompt=3 + 5 * seed, num_response=9 + 7 * seed) for seed in range(6)]
    alone = [scores_of(engine, request)[0] for request in requests]
    together = scores_of(engine, *reversed(requests))[::-1]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.sampled_logprobs, other.sampled_logprobs, atol=1e-5)


@pytest.mark.parametrize("capability", NEEDS)
def test_what_is_not_supplied_is_refused_and_what_is_supplied_comes(
    engine: ScoringEngine, capability: Capability
) -> None:
    request = make_request(7, **NEEDS[capability])
    if capability not in engine.info().capabilities:
        with pytest.raises(UnsupportedError, match=f"^{capability}: the {engine.info().engine} engine"):
            check_request(request, engine.info())
        return
    (found,) = scores_of(engine, request)
    expected = reference_scores(STUDENT_BASE, request, engine.info().num_defined_ids)
    for name in ("sampled_logprobs", "candidate_logprobs", "topk_logprobs", "entropy"):
        if getattr(found, name) is not None:
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=TOLERANCE, err_msg=name)


def test_every_engine_describes_the_same_model_alike(engine: ScoringEngine) -> None:
    found = engine.info()
    expected = load("transformers", STUDENT_BASE).info()
    own = {"engine", "capabilities", "max_context"}
    assert {Capability.SAMPLED_LOGPROBS, Capability.TEACHER_TOP_K} <= found.capabilities
    assert expected.max_context - 1 <= found.max_context <= expected.max_context
    for field in dataclasses.fields(found):
        if field.name not in own:
            assert getattr(found, field.name) == getattr(expected, field.name), field.name
