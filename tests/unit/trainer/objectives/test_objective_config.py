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
    Tail,
)
from services.trainer.objectives.aggregation import Reduction
from services.trainer.objectives.contract import Needs
from services.trainer.objectives.credit import Discounted, ToGo
from services.trainer.objectives.dispatch import build_objective
from services.trainer.objectives.entropy import EntropyBonus
from services.trainer.objectives.objective import Region
from services.trainer.objectives.outcome import Outcome
from services.trainer.objectives.sampled_token import SampledToken
from services.trainer.objectives.top_k import TopK

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
        ({"student_temperature": 0.5, "outcome": {"weight": 1.0}}, ["student_temperature=0.5", "outcome.weight=1.0"]),
        ({"student_temperature": 0.5, "credit": "to_go"}, ["student_temperature=0.5", "credit=to_go"]),
        ({"student_temperature": 0.5, "kind": "grpo"}, ["student_temperature=0.5", "kind=grpo"]),
        ({"gradient": "policy", "divergence": "jsd"}, ["objective.divergence=jsd", "gradient=policy", "remove it"]),
        ({"gradient": "policy", "tail": "bucket"}, ["objective.tail=bucket", "gradient=policy", "remove it"]),
        ({"kind": "sampled_token", "divergence": "forward_kl"}, ["objective.divergence=forward_kl", "remove it"]),
        ({"beta": 0.1}, ["objective.beta=0.1", "divergence=reverse_kl", "remove it"]),
        ({"kind": "grpo", "teacher_temperature": 2.0}, ["teacher_temperature=2.0", "no teacher", "remove it"]),
        ({"kind": "grpo", "outcome": {"weight": 2.0}}, ["objective.outcome", "kind=grpo", "remove it"]),
        ({"outcome": {"region": "beyond_horizon"}}, ["objective.outcome.region=beyond_horizon", "objective.horizon"]),
        (
            {"horizon": {"start": 4, "unreliable_below": 0.95}},
            ["objective.horizon.unreliable_below=0.95", "reliable_at=0.9", "lower it"],
        ),
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
        {"beta": 1.5},
        {"position_discount": 0.0},
        {"entropy_bonus": -1.0},
        {"outcome": {"weight": -1.0}},
        {"horizon": {"start": 0}},
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
    found = build_objective(config)
    assert found.reduction == Reduction(aggregation=Aggregation.SEQUENCE_MEAN, staleness_cap=2.0)
    (part,) = found.terms
    assert part.term == TopK(
        gradient=GradientForm.POLICY, support=Support.UNION, weight=SupportWeight.TEACHER, renormalize=False
    )
    exact = ObjectiveConfig(divergence="jsd", beta=0.25, tail="bucket", support="teacher")
    assert build_objective(exact).terms[0].term == TopK(support=Support.TEACHER, beta=0.25, tail=Tail.BUCKET)
    assert build_objective(ObjectiveConfig(kind="sampled_token")).terms[0].term == SampledToken()
    assert build_objective(ObjectiveConfig(kind="grpo")).terms[0].term == Outcome()


def test_terms_are_wrapped_and_added_as_set() -> None:
    config = ObjectiveConfig(
        kind="sampled_token", credit="to_go", position_discount=0.5, horizon={"start": 8}, entropy_bonus=0.25,
        outcome={"weight": 2.0, "region": "beyond_horizon"},
    )  # fmt: skip
    signal, outcome, entropy = build_objective(config).terms
    assert signal.term == ToGo(term=Discounted(term=SampledToken(), discount=0.5))
    assert (signal.region, signal.weight) == (Region.SUPERVISED, 1.0)
    assert (outcome.term, outcome.region, outcome.weight) == (Outcome(), Region.BEYOND, 2.0)
    assert (entropy.term, entropy.region, entropy.weight) == (EntropyBonus(), Region.ALL, 0.25)


@pytest.mark.parametrize("kind", list(ObjectiveKind))
def test_every_kind_has_a_module_that_says_what_it_needs(kind: ObjectiveKind) -> None:
    needs = build_objective(ObjectiveConfig(kind=kind)).needs
    assert needs != Needs()
    assert ObjectiveConfig(kind=kind).uses_teacher == bool(needs.capabilities)


def test_the_forward_kl_looks_where_the_teacher_does_unless_told() -> None:
    assert ObjectiveConfig(divergence="forward_kl").support is Support.TEACHER
    assert ObjectiveConfig(divergence="forward_kl", support="student").support is Support.STUDENT
    assert ObjectiveConfig(divergence="jsd").support is Support.STUDENT
    assert ObjectiveConfig(divergence="jsd", beta=0).support is Support.TEACHER
    assert ObjectiveConfig(divergence="jsd", beta=0.0, support="union").support is Support.UNION
    assert ObjectiveConfig(divergence="jsd", beta=0.5).support is ObjectiveConfig(divergence="jsd").support
    assert ObjectiveConfig(divergence="jsd").support is Support.STUDENT
    assert ObjectiveConfig(kind="full_vocabulary", divergence="jsd", beta=0).divergence_beta == 0.0
    assert ObjectiveConfig(kind="full_vocabulary", divergence="forward_kl").divergence_beta == 0.0


def test_reading_a_configuration_loads_no_torch() -> None:
    code = "import sys; import services.trainer.objectives; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=9)
