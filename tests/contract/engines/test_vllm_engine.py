"""What is particular to vLLM: capabilities as found, its own refusals, and that it can be had twice in one process."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from opd.errors import ConfigError, InvalidRequestError
from opd.types import Capability, Scores
from services.teacher_server.config import TeacherConfig
from services.teacher_server.engines.base import ForwardReport
from services.teacher_server.engines.vllm_engine import VllmEngine, load_vllm_engine
from services.teacher_server.engines.vllm_requests import VllmRun, run_together
from tests.contract.engines.conftest import STUDENT_BASE, VLLM, need_vllm
from tests.unit.teacher_server.tiny_teachers import make_request


def settings(**changes: Any) -> TeacherConfig:
    vllm = {"enforce_eager": True, "kv_cache_bytes": 256 << 20}
    return TeacherConfig(**({"model": str(STUDENT_BASE), "teacher": "tiny", "engine": "vllm", "vllm": vllm} | changes))


@pytest.fixture(scope="module", params=[VLLM])
def reports(request: pytest.FixtureRequest) -> list[ForwardReport]:
    need_vllm()
    return []


@pytest.fixture(scope="module")
def engine(reports: list[ForwardReport]) -> Iterator[VllmEngine]:
    loaded = load_vllm_engine(settings(max_context=200), reports.append)
    yield loaded
    loaded.close()


def test_capabilities_are_what_the_runner_takes(engine: VllmEngine) -> None:
    vllm = engine._model.engine
    (refusal_or_rows,) = [
        outcome
        for _, outcome in run_together(
            vllm,
            {
                0: VllmRun(
                    token_ids=np.arange(4, dtype=np.int32), first_row=1, width=0, fixed_ids_RK=np.ones((2, 3), "i4")
                )
            },
        )
    ]
    takes_ids = not isinstance(refusal_or_rows, InvalidRequestError)
    assert (Capability.CANDIDATE_LOGPROBS in engine.info().capabilities) == takes_ids
    absent = {Capability.ENTROPY, Capability.TEACHER_TEMPERATURE, Capability.HIDDEN_STATES, Capability.BATCH_INVARIANT}
    assert not absent & engine.info().capabilities


def test_the_context_is_what_was_set(engine: VllmEngine) -> None:
    assert engine.info().max_context == 200
    (found,) = engine.score([make_request(1, num_prompt=50, num_response=150)])
    assert isinstance(found, Scores)


def test_what_vllm_refuses_is_that_requests_error_and_nothing_stays_behind(engine: VllmEngine) -> None:
    too_long = make_request(2, num_prompt=150, num_response=150)
    first, refused, last = engine.score([make_request(3), too_long, make_request(4)])
    assert isinstance(first, Scores) and isinstance(last, Scores)
    assert isinstance(refused, InvalidRequestError) and "sequence of 300 tokens: vLLM refuses it" in refused.message
    assert not engine._model.engine.has_unfinished_requests()


def test_an_engine_that_fails_in_mid_batch_is_usable_afterwards(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = engine._model.engine
    step, num_steps = vllm.step, 0

    def fail_once() -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 1:
            raise RuntimeError("out of memory")
        return step()

    monkeypatch.setattr(vllm, "step", fail_once)
    requests = [make_request(seed) for seed in range(5)]
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.score(requests)
    assert not vllm.has_unfinished_requests()
    assert all(isinstance(outcome, Scores) for outcome in engine.score(requests))


def test_the_observer_hears_of_every_request(engine: VllmEngine, reports: list[ForwardReport]) -> None:
    reports.clear()
    engine.score([make_request(5, num_prompt=10, num_response=20), make_request(6, num_prompt=10, num_response=40)])
    assert sorted(report.num_tokens for report in reports) == [30, 50]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda:7"}, r"^device=cuda:7: this vLLM is built for \w+; use auto"),
        ({"max_context": 100_000}, r"^model=.*student-base: vLLM cannot load it \(.*max_model_len"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(
    reports: list[ForwardReport], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_vllm_engine(settings(**changes))
    assert "\n" not in caught.value.message
