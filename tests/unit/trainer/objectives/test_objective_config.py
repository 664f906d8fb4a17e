"""Which settings go together, and that a refusal names field, value and way out."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from services.trainer.objectives import (
    Aggregation,
    GradientForm,
    ObjectiveConfig,
    ObjectiveKind,
    Support,
    SupportWeight,
)
from services.trainer.objectives.aggregation import Reduction
from services.trainer.objectives.dispatch import build_objective
from services.trainer.objectives.sampled_token import SampledTokenObjective
from services.trainer.objectives.top_k import TopKObjective

ROOT = Path(__file__).parents[4]


def test_the_defaults_are_the_papers() -> None:
    config = ObjectiveConfig()
    assert config.kind is ObjectiveKind.TOP_K and config.gradient is GradientForm.EXACT
    assert config.support is Support.STUDENT and config.score_top_k == 16
    assert config.teacher_temperature == 1.0 and config.student_temperature is None
    assert config.aggregation is Aggregation.TOKEN_MEAN and config.staleness_cap is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"renormalize": False}, ["objective.renormalize=false", "gradient=exact", "gradient=policy"]),
        ({"weight": "uniform"}, ["objective.weight=uniform", "gradient=exact", "remove it"]),
        ({"kind": "sampled_token", "gradient": "policy"}, ["objective.gradient=policy", "sampled_token", "remove it"]),
        ({"kind": "sampled_token", "support": "union"}, ["objective.support=union", "remove it"]),
        ({"kind": "sampled_token", "renormalize": False}, ["objective.renormalize=false", "remove it"]),
        ({"kind": "sampled_token", "student_temperature": 0.5}, ["student_temperature=0.5", "leave it unset"]),
        ({"student_temperature": 0.5, "staleness_cap": 2.0}, ["student_temperature=0.5", "staleness_cap=2.0", "unset"]),
    ],
)
def test_contradictions_are_refused(settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValidationError) as refusal:
        ObjectiveConfig(**settings)
    message = refusal.value.errors()[0]["msg"]
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 16},
        {"score_top_k": 0},
        {"teacher_temperature": 0.0},
        {"teacher_temperature": float("inf")},
        {"student_temperature": -1.0},
        {"staleness_cap": 0.0},
        {"kind": "full"},
    ],
)
def test_unknown_keys_and_impossible_values_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        ObjectiveConfig(**settings)


def test_the_built_objective_has_every_setting() -> None:
    config = ObjectiveConfig(
        gradient="policy", support="union", weight="teacher", renormalize=False, staleness_cap=2.0,
        aggregation="sequence_mean",
    )  # fmt: skip
    assert build_objective(config) == TopKObjective(
        gradient=GradientForm.POLICY,
        support=Support.UNION,
        weight=SupportWeight.TEACHER,
        renormalize=False,
        reduction=Reduction(aggregation=Aggregation.SEQUENCE_MEAN, staleness_cap=2.0),
    )
    assert build_objective(ObjectiveConfig(kind="sampled_token")) == SampledTokenObjective()


def test_reading_a_configuration_loads_no_torch() -> None:
    code = "import sys; import services.trainer.objectives; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=9)
