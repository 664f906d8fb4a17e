"""Rows without a token, ties, and rows of NaN: the places where an engine may be almost right."""

from pathlib import Path

import numpy as np

from opd.errors import NonFiniteError
from opd.types import ScoreRequest, Scores
from services.teacher_server.engines.base import ScoringEngine
from tests.contract.engines.conftest import NAN_TOKEN, NUM_TIED_IDS
from tests.unit.teacher_server.tiny_teachers import NUM_DEFINED_IDS, VOCAB_ROWS, make_request, reference_scores

Hostile = tuple[ScoringEngine, Path]


def sound_request(seed: int, **changes: object) -> ScoreRequest:
    request = make_request(seed, **changes)
    for ids in (request.prompt_token_ids, request.response_token_ids):
        ids[ids == NAN_TOKEN] = 1
    return request


def poisoned_request(seed: int) -> ScoreRequest:
    request = sound_request(seed, num_prompt=6, num_response=9, score_top_k=2)
    request.prompt_token_ids[2] = NAN_TOKEN
    return request


def assert_exact(found: object, request: ScoreRequest, folder: Path) -> None:
    assert isinstance(found, Scores)
    expected = reference_scores(folder, request, NUM_DEFINED_IDS)
    np.testing.assert_allclose(found.sampled_logprobs, expected.sampled_logprobs, atol=1e-3)
    np.testing.assert_array_equal(found.topk_token_ids, expected.topk_token_ids)
    np.testing.assert_allclose(found.topk_logprobs, expected.topk_logprobs, atol=1e-3)


def test_rows_without_a_token_are_outside_the_normaliser(hostile_engine: Hostile) -> None:
    engine, folder = hostile_engine
    assert (engine.info().vocab_rows, engine.info().num_defined_ids) == (VOCAB_ROWS, NUM_DEFINED_IDS)
    request = sound_request(1, num_response=20, score_top_k=1)
    within = reference_scores(folder, request, NUM_DEFINED_IDS).sampled_logprobs
    beyond = reference_scores(folder, request, VOCAB_ROWS).sampled_logprobs
    assert within is not None and beyond is not None and np.abs(within - beyond).max() > 1
    assert_exact(engine.score([request])[0], request, folder)


def test_ties_go_to_the_lower_id_however_many_there_are(hostile_engine: Hostile) -> None:
    engine, folder = hostile_engine
    for score_top_k in (12, 30, 60, NUM_DEFINED_IDS):
        request = sound_request(2, num_response=20, score_top_k=score_top_k)
        expected = reference_scores(folder, request, NUM_DEFINED_IDS).topk_token_ids
        assert expected is not None and (expected < NUM_TIED_IDS).any()
        assert_exact(engine.score([request])[0], request, folder)


def test_a_row_of_nan_is_its_own_requests_error(hostile_engine: Hostile) -> None:
    engine, folder = hostile_engine
    sound = [sound_request(seed, num_prompt=20, num_response=30, score_top_k=2) for seed in (3, 4, 5)]
    for _ in range(3):
        found = engine.score([poisoned_request(6), sound[0], poisoned_request(7), *sound[1:]])
        for place in (0, 2):
            outcome = found[place]
            assert isinstance(outcome, NonFiniteError) and "at 9 of 9 scored positions" in outcome.message
        for outcome, request in zip([found[1], *found[3:]], sound, strict=True):
            assert_exact(outcome, request, folder)


def test_nan_is_not_inherited_by_whoever_comes_next(hostile_engine: Hostile) -> None:
    """vLLM hands on the memory of a finished sequence as it is; short sequences look into what lies behind them."""
    engine, folder = hostile_engine
    later = [sound_request(seed, num_response=5, score_top_k=2) for seed in range(10, 18)]
    for _ in range(2):
        neighbours = [sound_request(seed, num_response=20) for seed in range(3)]
        outcomes = engine.score([neighbours[0], poisoned_request(6), *neighbours[1:]])
        assert isinstance(outcomes[1], NonFiniteError)
        for outcome, request in zip(engine.score(later), later, strict=True):
            assert_exact(outcome, request, folder)
