"""What an engine refuses, and how it names it."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from opd.errors import ConfigError, InvalidRequestError, NonFiniteError, UnsupportedError
from opd.types import Rollout
from services.trainer.rollout.base import RolloutRequest, SamplingParams
from tests.unit.trainer.rollout.tiny_students import DEFINED, assert_recorded_exactly, engine, qwen, requests, sharpen


def test_non_finite_logits_name_the_rollout_and_leave_no_trace() -> None:
    model = qwen()
    instance = engine(model)
    spoilt = model.model.embed_tokens.weight[37].clone()
    wanted = [
        RolloutRequest(rollout_id="run.4.good", group=0, prompt_token_ids=np.array([3, 4], np.int32), seed=0),
        RolloutRequest(rollout_id="run.4.bad", group=1, prompt_token_ids=np.array([5, 37], np.int32), seed=0),
    ]
    with torch.no_grad():
        model.model.embed_tokens.weight[37] = float("nan")
    with pytest.raises(NonFiniteError, match=r"rollout run\.4\.bad: .*position 0"):
        instance.sample(wanted, SamplingParams(max_response_tokens=4))
    with torch.no_grad():
        model.model.embed_tokens.weight[37] = spoilt
    for rollout in instance.sample(wanted, SamplingParams(max_response_tokens=4)):
        assert_recorded_exactly(model, rollout)


def test_an_error_of_the_receiver_passes_through() -> None:
    def on_finish(rollout: Rollout) -> None:
        raise KeyError(rollout.rollout_id)

    with pytest.raises(KeyError):
        engine(qwen()).sample(requests(2), SamplingParams(max_response_tokens=4), on_finish=on_finish)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one token"),
        ([[3, 4]], "shape"),
        ([3, DEFINED], f"id {DEFINED}, outside 0..{DEFINED - 1}"),
        ([3, -1], "id -1"),
        ([3] * 250, "need 258 of the student's 256 context tokens"),
    ],
)
def test_unusable_prompts_are_refused_by_name(prompt: list[Any], message: str) -> None:
    bad = RolloutRequest(rollout_id="run.0.7", group=0, prompt_token_ids=np.array(prompt, np.int32), seed=0)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        engine(qwen()).sample([bad], SamplingParams(max_response_tokens=8))
    assert "run.0.7" in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}, {"max_response_tokens": 0}]
)
def test_unusable_sampling_is_refused_by_name(changes: dict[str, Any]) -> None:
    (field,) = changes
    with pytest.raises(ConfigError, match=rf"^sampling\.{field}: "):
        engine(qwen()).sample(requests(1), SamplingParams(**changes))


@pytest.mark.parametrize("changes", [{"max_slots": 0}, {"score_top_k": DEFINED + 1}])
def test_unusable_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        engine(qwen(), **changes)


def test_no_requests_no_rollouts() -> None:
    assert engine(qwen()).sample([], SamplingParams()) == []


def test_a_model_that_slots_would_get_wrong_is_refused() -> None:
    class Shifted(Qwen3ForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2.0
            return output

    torch.manual_seed(0)
    model = Shifted(qwen().config)
    sharpen(model)
    with pytest.raises(UnsupportedError, match="differ by"):
        engine(model)
