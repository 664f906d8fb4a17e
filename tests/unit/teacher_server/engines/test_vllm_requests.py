"""What is asked of vLLM and how its answers are read, as its source lays them out; vLLM itself is not needed.

So the path of the V2 model runner, which wants a GPU, is held to the shapes that runner's source gives.
"""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from opd.errors import ConfigError, InternalError, InvalidRequestError, NonFiniteError
from opd.types import PAD_ID, Scores
from services.teacher_server.config import TeacherConfig
from services.teacher_server.engines import vllm_requests
from services.teacher_server.engines.vllm_engine import is_tied_beyond, load_vllm_engine, plan_run, to_scores
from services.teacher_server.engines.vllm_requests import VllmRows, VllmRun, read_output, run_together
from tests.unit.teacher_server.tiny_teachers import make_request, save_tiny_teacher

NUM_IDS = 90


@dataclass
class Flat:
    """vllm.logprobs.FlatLogprobs, as far as it is read."""

    num_positions: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return self.num_positions


@dataclass
class Output:
    """vllm.outputs.RequestOutput, as far as it is read."""

    request_id: str
    prompt_logprobs: Flat | None = None
    prompt_token_id_logprobs: Any = None
    finished: bool = True


def answer(run: VllmRun, logprobs_TV: Any, request_id: str = "0") -> Output:
    """What the runner says of a sequence whose row t has log-probs logprobs_TV[t]."""
    flat = None
    if run.width is not None:
        flat = Flat(num_positions=run.token_ids.size)
        for row_V, token in zip(logprobs_TV, run.token_ids[1:], strict=False):
            best = np.argsort(-row_V, kind="stable")[: run.width]
            flat.token_ids += [int(token), *best.tolist()]
            flat.logprobs += [float(row_V[token]), *row_V[best].tolist()]
    fixed_RK = None
    if run.fixed_ids_RK is not None:
        rows_RV = logprobs_TV[run.first_row : run.first_row + run.num_rows]
        fixed_RK = np.take_along_axis(rows_RV, np.maximum(run.fixed_ids_RK, 0), axis=1)
        fixed_RK[run.fixed_ids_RK < 0] = -np.inf
    return Output(request_id, flat, fixed_RK)


def random_logprobs(num_rows: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(-5, 2, (num_rows, NUM_IDS)).astype(np.float32)


def rows_of(run: VllmRun, logprobs_TV: Any) -> VllmRows:
    found = read_output(answer(run, logprobs_TV), run)
    assert isinstance(found, VllmRows)
    return found


@pytest.mark.parametrize("score_top_k", [0, 3])
def test_candidates_go_as_fixed_ids_with_the_sampled_one_in_front(score_top_k: int) -> None:
    candidates_RK = np.array([[4, 5], [6, PAD_ID], [PAD_ID, PAD_ID]], np.int32)
    request = make_request(1, num_prompt=4, num_response=3, score_top_k=score_top_k, candidate_token_ids=candidates_RK)
    run = plan_run(request, score_top_k and score_top_k + 4)
    assert run.fixed_ids_RK is not None and run.num_rows == 3
    # vLLM wants a row per prompt token behind `prompt_logprob_start`, the last one aside.
    assert run.fixed_ids_RK.shape == (run.token_ids.size - 1 - run.first_row, 3)
    assert (run.fixed_ids_RK[:, 0] == request.response_token_ids).all()
    assert (run.width is None) == (score_top_k == 0)
    logprobs_TV = random_logprobs(7)
    found = to_scores(rows_of(run, logprobs_TV), request)
    assert isinstance(found, Scores) and found.sampled_logprobs is not None and found.candidate_logprobs is not None
    expected_RV = logprobs_TV[3:6]
    for row in range(3):
        assert found.sampled_logprobs[row] == expected_RV[row, request.response_token_ids[row]]
        for column in range(2):
            candidate = candidates_RK[row, column]
            value = found.candidate_logprobs[row, column]
            assert np.isnan(value) if candidate == PAD_ID else value == expected_RV[row, candidate]


def test_ranked_ids_are_read_whether_or_not_the_sampled_one_is_among_them() -> None:
    request = make_request(2, num_prompt=1, num_response=6, score_top_k=5)
    logprobs_TV = random_logprobs(7)
    logprobs_TV[0, request.response_token_ids[0]] = 5.0
    logprobs_TV[1, request.response_token_ids[1]] = -50.0
    found = to_scores(rows_of(plan_run(request, 9), logprobs_TV), request)
    assert isinstance(found, Scores) and found.topk_token_ids is not None and found.sampled_logprobs is not None
    assert found.topk_token_ids[0, 0] == request.response_token_ids[0] and found.sampled_logprobs[1] == -50.0
    np.testing.assert_array_equal(found.topk_token_ids, np.argsort(-logprobs_TV[:6], axis=1, kind="stable")[:, :5])


def test_ties_go_to_the_lower_id_and_a_tie_at_the_end_asks_for_more() -> None:
    request = make_request(3, num_response=1, score_top_k=2)
    ranked = VllmRows(
        sampled_logprobs_R=np.array([-9.0], np.float32),
        ranked_ids_RN=np.array([[7, 5, 3, 8]], np.int32),
        ranked_logprobs_RN=np.array([[-1.0, -2.0, -2.0, -3.0]], np.float32),
    )
    assert not is_tied_beyond(ranked, request, NUM_IDS)
    found = to_scores(ranked, request)
    assert isinstance(found, Scores) and found.topk_token_ids is not None
    assert found.topk_token_ids.tolist() == [[7, 3]]
    ranked.ranked_logprobs_RN[0, 3] = -2.0
    assert is_tied_beyond(ranked, request, NUM_IDS) and not is_tied_beyond(ranked, request, num_defined_ids=4)


def test_a_scored_row_of_nan_is_an_error_and_an_unscored_one_is_not() -> None:
    scored_R = np.array([True, True, False])
    request = make_request(4, num_prompt=2, num_response=3, score_top_k=1, scored_rows=scored_R)
    logprobs_TV = random_logprobs(5)
    logprobs_TV[3] = np.nan
    assert isinstance(to_scores(rows_of(plan_run(request, 2), logprobs_TV), request), Scores)
    logprobs_TV[2] = np.nan
    found = to_scores(rows_of(plan_run(request, 2), logprobs_TV), request)
    assert isinstance(found, NonFiniteError) and "at 1 of 2 scored positions, first at 1" in found.message


def test_missing_rows_are_an_error_and_never_filled() -> None:
    run = plan_run(make_request(5, score_top_k=2), 3)
    assert isinstance(read_output(Output("0"), run), InternalError)
    cut = answer(run, random_logprobs(12))
    assert cut.prompt_logprobs is not None
    cut.prompt_logprobs.num_positions -= 1
    assert isinstance(read_output(cut, run), InternalError)
    candidates = make_request(5, candidate_token_ids=np.ones((7, 2), np.int32))
    run = plan_run(candidates, 0)
    assert isinstance(read_output(Output("0"), run), InternalError)
    short = Output("0", None, np.zeros((6, 3), np.float32))
    assert isinstance(read_output(short, run), InternalError)


class FakeVllm:
    """Answers the newest request first, one a step; refuses sequences of 3 tokens."""

    def __init__(self, fails_at: int = -1) -> None:
        self.held: dict[str, VllmRun] = {}
        self.aborted: list[str] = []
        self._fails_at = fails_at

    def add_request(self, request_id: str, prompt: dict[str, list[int]], run: VllmRun) -> str:
        if len(prompt["prompt_token_ids"]) == 3:
            raise ValueError("too short\nand more")
        self.held[request_id] = run
        return f"{request_id}-internal"

    def step(self) -> list[Output]:
        if len(self.held) == self._fails_at:
            raise RuntimeError("out of memory")
        request_id, run = self.held.popitem()
        return [answer(run, random_logprobs(run.token_ids.size, int(request_id)), request_id)]

    def abort_request(self, request_ids: list[str], internal: bool) -> None:
        assert internal
        self.aborted += request_ids


def runs_of_length(*lengths: int) -> dict[int, VllmRun]:
    return {
        key: VllmRun(token_ids=np.arange(length, dtype=np.int32), first_row=0, width=1)
        for key, length in enumerate(lengths)
    }


def test_answers_find_their_requests_and_a_refusal_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_requests, "_params", lambda run: run)
    monkeypatch.setattr(vllm_requests, "_refusals", lambda: (ValueError,))
    engine, runs = FakeVllm(), runs_of_length(5, 3, 8)
    found = dict(run_together(engine, runs))
    refused = found[1]
    assert isinstance(refused, InvalidRequestError)
    assert refused.message == "sequence of 3 tokens: vLLM refuses it (too short)"
    for key in (0, 2):
        rows = found[key]
        assert isinstance(rows, VllmRows)
        expected_TV = random_logprobs(runs[key].token_ids.size, key)
        np.testing.assert_array_equal(rows.ranked_ids_RN[:, 0], expected_TV[:-1].argmax(axis=1))
    assert engine.aborted == []


def test_a_failing_engine_is_left_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_requests, "_params", lambda run: run)
    monkeypatch.setattr(vllm_requests, "_refusals", lambda: (ValueError,))
    engine = FakeVllm(fails_at=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        dict(run_together(engine, runs_of_length(5, 6)))
    assert engine.aborted == ["0-internal", "1-internal"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_without_vllm_the_way_out_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_tiny_teacher(tmp_path_factory.mktemp("models") / "tiny")
    with pytest.raises(ConfigError, match=r"^engine=vllm: vLLM is not installed here; run scripts/setup_vllm\.sh"):
        load_vllm_engine(TeacherConfig(model=str(folder), engine="vllm", cache_folder=None))
