import numpy as np
import pytest

from opd.types import Scores
from services.teacher_server.canary import Canary, CanaryState, probe_request
from services.teacher_server.request_checks import check_request
from tests.unit.teacher_server.fake_engine import FakeEngine, fake_info


@pytest.mark.parametrize(("max_context", "num_ids"), [(128, 90), (5, 90), (2, 90), (128, 3)])
def test_the_probe_is_a_request_every_teacher_accepts(max_context: int, num_ids: int) -> None:
    info = fake_info(max_context=max_context, num_defined_ids=num_ids)
    request = probe_request(info)
    check_request(request, info)
    assert request.num_tokens == min(24, max_context) and request.batch_invariant


def test_a_steady_engine_is_sound_and_a_drifting_one_is_not() -> None:
    engine = FakeEngine()
    canary = Canary(engine)
    assert canary.check().is_sound and canary.check().is_sound
    engine.shift = 0.01
    verdict = canary.check()
    assert verdict.state is CanaryState.DRIFTED and "moved by 0.01" in verdict.reason
    engine.shift = 0.0
    assert canary.check().is_sound


def test_uniform_rows_are_not_sound() -> None:
    class Uniform(FakeEngine):
        def _one(self, request):  # type: ignore[no-untyped-def]
            return Scores(sampled_logprobs=np.full(request.response_token_ids.size, -np.log(90), np.float32))

    verdict = Canary(Uniform()).check()
    assert verdict.state is CanaryState.UNIFORM and "-ln 90" in verdict.reason


def test_non_finite_rows_are_not_sound() -> None:
    engine = FakeEngine()
    engine.shift = float("nan")
    assert Canary(engine).check().state is CanaryState.NON_FINITE


def test_an_engine_that_raises_is_a_verdict_and_no_exception() -> None:
    engine = FakeEngine()
    engine.is_broken = True
    verdict = Canary(engine).check()
    assert verdict.state is CanaryState.FAILED and "device-side assert" in verdict.reason


def test_a_first_unsound_run_sets_no_golden_values() -> None:
    engine = FakeEngine()
    canary = Canary(engine)
    engine.shift = float("nan")
    assert not canary.check().is_sound
    engine.shift = 0.0
    assert canary.check().is_sound
