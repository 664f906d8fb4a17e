import numpy as np
import pytest

from opd.errors import InternalError, NonFiniteError, TeacherUnavailableError
from opd.types import ScoreRequest, Scores
from services.teacher_server.canary import Canary, CanaryState
from services.teacher_server.guarded_engine import GuardedEngine
from tests.unit.teacher_server.fake_engine import CRASH_ID, NAN_ID, FakeEngine
from tests.unit.teacher_server.tiny_teachers import make_request


def guarded() -> tuple[FakeEngine, GuardedEngine]:
    engine = FakeEngine()
    canary = Canary(engine)
    assert canary.check().is_sound
    engine.batches.clear()
    return engine, GuardedEngine(engine, canary)


def named(name: str, token: int = 5) -> ScoreRequest:
    return make_request(rollout_id=name, prompt_token_ids=np.array([token], np.int32))


def test_a_sound_batch_is_scored_once_and_asks_nobody() -> None:
    engine, guard = guarded()
    result = guard.score([named("a"), named("b")])
    assert engine.batches == [["a", "b"]] and result.verdict is None
    assert all(isinstance(outcome, Scores) for outcome in result.outcomes)


def test_a_request_that_crashes_the_engine_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine, guard = guarded()
    result = guard.score([named("a"), named("poison", CRASH_ID), named("b")])
    assert engine.batches == [["a", "poison", "b"], ["a"], ["poison"], ["canary"], ["b"]]
    first, failed, last = result.outcomes
    assert isinstance(first, Scores) and isinstance(last, Scores)
    assert isinstance(failed, InternalError) and "rollout poison" in failed.message
    assert "device-side assert" in caplog.text and "device-side assert" not in failed.message


def test_a_non_finite_request_keeps_its_error_when_the_engine_is_sound() -> None:
    engine, guard = guarded()
    result = guard.score([named("a"), named("nan", NAN_ID)])
    assert isinstance(result.outcomes[0], Scores) and isinstance(result.outcomes[1], NonFiniteError)
    assert engine.batches == [["a", "nan"], ["canary"]]
    assert result.verdict is not None and result.verdict.is_sound


def test_a_dead_engine_is_nobodys_fault_and_spares_the_rest() -> None:
    engine, guard = guarded()
    engine.is_broken = True
    result = guard.score([named("a"), named("b"), named("c")])
    assert [type(outcome) for outcome in result.outcomes] == [TeacherUnavailableError] * 3
    assert engine.batches == [["a", "b", "c"], ["a"], ["canary"]]
    assert result.verdict is not None and result.verdict.state is CanaryState.FAILED


def test_what_an_unsound_engine_has_kept_is_forgotten() -> None:
    engine, guard = guarded()
    guard.check()
    assert engine.num_forgotten == 0
    engine.is_broken = True
    assert not guard.check().is_sound
    guard.score([named("a")])
    assert engine.num_forgotten >= 2
