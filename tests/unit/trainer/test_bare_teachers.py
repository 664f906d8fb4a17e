"""Training with a teacher that says little: what it does not say is absent from the metrics, and nothing is wrong."""

import dataclasses
from typing import Any

import pytest

from opd.types import Capability
from services.trainer.objectives.config import ObjectiveConfig, SupportWeight
from services.trainer.step_metrics import StepMetrics
from tests.unit.trainer.tiny_training import TEACHER_INFO, ExactClient, Setup, tiny_model

BARE = frozenset({Capability.SAMPLED_LOGPROBS, Capability.TEACHER_TOP_K})


def step(objective: ObjectiveConfig, capabilities: frozenset[Capability]) -> tuple[Setup, Any]:
    client = ExactClient(model=tiny_model(2), current_info=dataclasses.replace(TEACHER_INFO, capabilities=capabilities))
    setup = Setup(objective=objective, client=client, num_steps=1)
    return setup, setup.loop().run_step()


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "sampled_token"},
        {"support": "teacher"},
        {"support": "overlap", "divergence": "jsd"},
        {"divergence": "forward_kl"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_objectives_without_candidates_take_the_same_step_with_less_said(settings: dict[str, str]) -> None:
    objective = ObjectiveConfig(score_top_k=6, **settings)
    found = {name: step(objective, caps) for name, caps in (("bare", BARE), ("full", frozenset(Capability)))}
    parameters = {name: setup.parameters() for name, (setup, _) in found.items()}
    assert parameters["bare"].equal(parameters["full"])
    metrics = StepMetrics(weight=SupportWeight.STUDENT, decode=None)
    values = {name: metrics.summarize(record).values for name, (_, record) in found.items()}
    absent = values["full"].keys() - values["bare"].keys()
    assert absent == {
        *("loss/reverse_kl", "distill/extreme_prob_gap", "distill/extreme_prob_gap_abs"),
        *("distill/entropy_teacher", "distill/entropy_gap"),
    }
    for name in values["bare"]:
        if not name.startswith("timing/"):
            assert values["bare"][name] == values["full"][name], name
