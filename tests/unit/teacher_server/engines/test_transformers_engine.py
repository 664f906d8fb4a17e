from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from opd.errors import NonFiniteError
from opd.types import PAD_ID, Capability, ScoreRequest, Scores
from services.teacher_server.engines.base import ForwardReport
from services.teacher_server.engines.transformers_engine import EngineLimits, TransformersEngine, load_engine
from tests.unit.teacher_server.tiny_teachers import (
    MAX_CONTEXT,
    NUM_DEFINED_IDS,
    VOCAB_ROWS,
    make_request,
    random_ids,
    reference_logprobs,
    reference_scores,
    save_tiny_teacher,
)

MODELS = Path(__file__).parents[4] / "testbed" / "models"


def load(folder: Path, **changes: object) -> TransformersEngine:
    settings = {"teacher": "tiny", "device": "cpu", "dtype": "float32", "max_context": 0, "limits": EngineLimits()}
    return load_engine(str(folder), **(settings | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="module")
def engine(folder: Path) -> TransformersEngine:
    return load(folder)


def full_request(seed: int, **changes: object) -> ScoreRequest:
    """Asks for everything, with a padded candidate."""
    plain = make_request(seed, **changes)
    candidates = random_ids(np.random.default_rng(seed + 99), plain.response_token_ids.size, 4)
    candidates[1, 2:] = PAD_ID
    return replace(plain, candidate_token_ids=candidates, score_top_k=6, wants_entropy=True)


def scored(engine: TransformersEngine, *requests: ScoreRequest) -> list[Scores]:
    outcomes = engine.score(requests)
    assert all(isinstance(outcome, Scores) for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, Scores)]


def assert_equal(found: Scores, expected: Scores, tolerance: float) -> None:
    for field in fields(Scores):
        left, right = getattr(found, field.name), getattr(expected, field.name)
        assert (left is None) == (right is None), field.name
        if left is not None:
            np.testing.assert_allclose(left, right, atol=tolerance, rtol=0, err_msg=field.name)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_every_field_equals_a_plain_float64_forward(
    engine: TransformersEngine, folder: Path, temperature: float
) -> None:
    request = full_request(1, num_prompt=9, num_response=21, teacher_temperature=temperature)
    (scores,) = scored(engine, request)
    assert_equal(scores, reference_scores(folder, request), 1e-4)
    assert scores.candidate_logprobs is not None and np.isnan(scores.candidate_logprobs[1, 2:]).all()
    assert scores.sampled_logprobs is not None and scores.sampled_logprobs.dtype == np.float32


def test_fields_not_asked_for_are_absent(engine: TransformersEngine) -> None:
    (scores,) = scored(engine, make_request(2, wants_sampled=False, wants_entropy=True))
    assert scores.entropy is not None
    assert (scores.sampled_logprobs, scores.candidate_logprobs, scores.topk_token_ids) == (None, None, None)


def test_rows_outside_the_mask_are_nan_and_the_others_unchanged(engine: TransformersEngine, folder: Path) -> None:
    mask = np.array([True, False, False, True, True, False, True])
    request = replace(full_request(3), scored_rows=mask)
    (scores,) = scored(engine, request)
    expected = reference_scores(folder, request)
    assert scores.sampled_logprobs is not None and scores.entropy is not None and scores.topk_token_ids is not None
    np.testing.assert_allclose(scores.sampled_logprobs[mask], expected.sampled_logprobs[mask], atol=1e-4)
    np.testing.assert_allclose(scores.entropy[mask], expected.entropy[mask], atol=1e-4)
    assert np.isnan(scores.sampled_logprobs[~mask]).all() and np.isnan(scores.entropy[~mask]).all()
    assert (scores.topk_token_ids[~mask] == PAD_ID).all()


def test_an_empty_mask_scores_nothing(engine: TransformersEngine) -> None:
    (scores,) = scored(engine, replace(full_request(3), scored_rows=np.zeros(7, np.bool_)))
    assert scores.sampled_logprobs is not None and np.isnan(scores.sampled_logprobs).all()


def test_the_shortest_request_is_scored(engine: TransformersEngine, folder: Path) -> None:
    request = make_request(4, num_prompt=1, num_response=1, wants_entropy=True, score_top_k=NUM_DEFINED_IDS)
    (scores,) = scored(engine, request)
    assert_equal(scores, reference_scores(folder, request), 1e-4)


def test_padded_vocabulary_rows_have_no_probability(engine: TransformersEngine) -> None:
    (scores,) = scored(engine, make_request(5, score_top_k=NUM_DEFINED_IDS))
    assert engine.info().vocab_rows == VOCAB_ROWS and engine.info().num_defined_ids == NUM_DEFINED_IDS
    assert scores.topk_token_ids is not None and scores.topk_token_ids.max() < NUM_DEFINED_IDS
    np.testing.assert_allclose(np.exp(scores.topk_logprobs.astype(np.float64)).sum(axis=1), 1.0, atol=1e-5)


def test_scores_do_not_depend_on_neighbours(engine: TransformersEngine) -> None:
    mixed = [full_request(seed, num_prompt=3 + seed, num_response=40 - 4 * seed) for seed in range(8)]
    for request, together in zip(mixed, scored(engine, *mixed), strict=True):
        (alone,) = scored(engine, request)
        assert_equal(together, alone, 1e-5)


def test_neighbours_with_other_wants_and_temperatures_keep_their_own(engine: TransformersEngine, folder: Path) -> None:
    plain = make_request(11, num_response=12)
    hot = full_request(12, num_response=12, teacher_temperature=3.0)
    for request, scores in zip((plain, hot), scored(engine, plain, hot), strict=True):
        expected = reference_scores(folder, request)
        np.testing.assert_allclose(scores.sampled_logprobs, expected.sampled_logprobs, atol=1e-4)
        assert (scores.entropy is not None) == request.wants_entropy


def test_batch_invariant_repeats_are_bit_equal_whatever_runs_beside_them(engine: TransformersEngine) -> None:
    request = replace(full_request(6), batch_invariant=True, wants_hidden_states=True)
    others = [full_request(seed, num_response=9) for seed in range(20, 24)]
    (first,) = scored(engine, request)
    second = scored(engine, *others, request)[-1]
    for field in fields(Scores):
        assert getattr(first, field.name).tobytes() == getattr(second, field.name).tobytes(), field.name


def test_a_broken_row_fails_only_the_request_that_uses_it(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "broken", nan_token=17)
    engine = load(folder)
    clean = [make_request(seed, num_response=5 + seed) for seed in range(30, 60)]
    clean = [request for request in clean if 17 not in {*request.prompt_token_ids, *request.response_token_ids}][:6]
    poisoned = make_request(61, num_response=14, prompt_token_ids=np.array([3, 17, 5], np.int32))
    outcomes = engine.score([*clean[:3], poisoned, *clean[3:]])
    failed = outcomes.pop(3)
    assert isinstance(failed, NonFiniteError) and "14 of 14 scored positions" in failed.message
    for request, outcome in zip(clean, outcomes, strict=True):
        assert isinstance(outcome, Scores) and outcome.sampled_logprobs is not None
        expected = reference_logprobs(folder, request, NUM_DEFINED_IDS)
        own = expected[np.arange(len(expected)), request.response_token_ids]
        np.testing.assert_allclose(outcome.sampled_logprobs, own, atol=1e-4)


def test_a_fault_names_the_first_scored_position_it_reached(tmp_path: Path) -> None:
    engine = load(save_tiny_teacher(tmp_path / "broken", nan_token=17))
    request = make_request(7, response_token_ids=np.array([4, 5, 17, 6], np.int32))
    (outcome,) = engine.score([replace(request, scored_rows=np.array([False, False, False, True]))])
    assert isinstance(outcome, NonFiniteError) and "first at 3" in outcome.message


def test_batches_over_the_budget_are_split_and_reported(folder: Path) -> None:
    reports: list[ForwardReport] = []
    engine = load(folder, limits=EngineLimits(max_batch_tokens=40), observe=reports.append)
    requests = [make_request(seed, num_prompt=4, num_response=12) for seed in range(6)]
    scored(engine, *requests)
    assert [report.num_requests for report in reports] == [2, 2, 2]
    assert all(report.num_padded_tokens <= 40 for report in reports)
    assert sum(report.num_tokens for report in reports) == 6 * 15


def test_the_handshake_describes_the_model(engine: TransformersEngine) -> None:
    info = engine.info()
    assert (info.engine, info.dtype, info.max_context, info.eos_token_ids) == (
        "transformers",
        "float32",
        MAX_CONTEXT,
        (0,),
    )
    assert info.capabilities == set(Capability) - {Capability.HIDDEN_STATES}
    assert info.max_score_top_k == NUM_DEFINED_IDS and info.model == "tiny"
    assert len(info.fingerprint) == 16 and info.special_tokens == {"eos_token": 0}


def test_low_precision_stays_near_the_full_precision_scores(folder: Path) -> None:
    request = full_request(8, num_response=20)
    (scores,) = scored(load(folder, dtype="bfloat16"), request)
    expected = reference_scores(folder, request)
    assert scores.sampled_logprobs is not None
    assert np.abs(scores.sampled_logprobs - expected.sampled_logprobs).mean() < 0.1


@pytest.mark.parametrize("path", sorted(MODELS.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_bundled_models_are_scored_exactly(path: Path) -> None:
    engine = load(path.parent)
    info = engine.info()
    generator = np.random.default_rng(3)
    ids = generator.integers(0, info.num_defined_ids, 60).astype(np.int32)
    request = make_request(1, prompt_token_ids=ids[:20], response_token_ids=ids[20:], score_top_k=8, wants_entropy=True)
    (scores,) = scored(engine, request)
    assert_equal(scores, reference_scores(path.parent, request, info.num_defined_ids), 1e-4)
