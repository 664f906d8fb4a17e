"""Every rule fires on a history of its kind, names its numbers and steps, and says nothing of runs that work."""

from collections.abc import Callable
from typing import Any

import pytest

from opd.settings import load_settings
from services.trainer.alarms.config import AlarmSettings
from services.trainer.alarms.contract import AlarmName
from services.trainer.alarms.history import History
from services.trainer.alarms.rules import RULES, find
from services.trainer.alarms.watch import AlarmWatch
from tests.unit.trainer.alarms.histories import history, measured, with_entropies

OVERLAP, ADVANTAGE, GAP = "distill__overlap_ratio", "distill__overlap_advantage", "distill__entropy_gap"
STUDENT, TEACHER, NORM = "distill__entropy_student", "distill__entropy_teacher", "optim__grad_norm"


def ramp(begin: float, end: float, first: int, last: int) -> Callable[[int], float]:
    """`begin` up to step `first`, `end` from step `last`, straight between."""
    return lambda step: begin + (end - begin) * min(max((step - first) / (last - first), 0.0), 1.0)


def stalled(num_steps: int = 60, **changes: Any) -> History:
    """The failing run of Fig 6: overlap, advantage, entropy gap and loss where they were."""
    columns = {OVERLAP: 0.62, ADVANTAGE: -0.03, GAP: 0.4, "loss__reverse_kl": 0.3}
    return history(num_steps, **(columns | changes))


def collapsed(**changes: Any) -> History:
    """The 15K run of Figs 12 and 13: overlap falls late, entropy climbs from the last bucket."""
    overlap = {OVERLAP: lambda step: ramp(0.7, 0.9, 1, 40)(step) - ramp(0.0, 0.16, 52, 60)(step)}
    found = history(60, **(overlap | changes))
    with_entropies(found, lambda step: [0.4, 0.4, 0.4 + ramp(0.0, 0.3, 52, 60)(step), ramp(0.4, 2.5, 50, 60)(step)])
    return found


def masses(student: float, teacher: float, advantage: float) -> History:
    return history(
        5,
        **{ADVANTAGE: advantage, "distill__overlap_mass_student": student, "distill__overlap_mass_teacher": teacher},
    )


def lengths(tokens: Callable[[int], float] | float, truncated: Callable[[int], float] | float) -> History:
    return history(30, rollout__response_length=tokens, rollout__truncated_fraction=truncated)


FAILING: dict[AlarmName, History] = {
    AlarmName.OVERLAP_STAGNATING: stalled(),
    AlarmName.OVERLAP_COLLAPSE: collapsed(),
    AlarmName.DIVERGENCE_RISING: history(20, loss__reverse_kl=ramp(0.2, 0.8, 5, 15)),
    AlarmName.ENTROPY_COLLAPSE: history(30, **{STUDENT: ramp(0.5, 0.05, 10, 30), TEACHER: 0.4}),
    AlarmName.LOW_OVERLAP_MASS: masses(0.8, 0.85, -0.004),
    AlarmName.CANCELLING_GRADIENTS: history(40, **{ADVANTAGE: ramp(-0.02, -0.04, 5, 30), NORM: ramp(1.0, 0.4, 5, 30)}),
    AlarmName.GRADIENT_SPIKE: history(20, **{NORM: lambda step: 3.0 if step == 20 else 0.3}),
    AlarmName.LENGTH_EXPLOSION: lengths(ramp(200.0, 900.0, 10, 30), 0.0),
    AlarmName.EOS_MISMATCH: history(4, rollout__eos_logprob_student=-0.1, rollout__eos_logprob_teacher=-14.0),
    AlarmName.SMALL_SUPPORTS: history(3, loss__small_support_fraction=0.4),
    AlarmName.UNIFORM_TEACHER: history(1, distill__uniform_teacher_fraction=0.2),
}

EVIDENCE = {
    AlarmName.OVERLAP_STAGNATING: "overlap ratio 0.6200 to 0.6200 over steps 21-60, advantage -0.03 to -0.03, "
    "entropy gap 0.4 to 0.4, reverse KL 0.3 at the start and 0.3 now",
    AlarmName.OVERLAP_COLLAPSE: "overlap ratio 0.9000 (steps 40-42) to 0.7600 (steps 58-60), student entropy 0.4 to "
    "2.29 at positions from 4096, 0.4 to 0.4 at the front",
    AlarmName.DIVERGENCE_RISING: "reverse KL 0.2 (steps 1-5) to 0.74 nats per position (steps 11-20)",
    AlarmName.ENTROPY_COLLAPSE: "student entropy 0.5 (steps 1-5) to 0.0725 nats (steps 28-30), teacher 0.4 then",
    AlarmName.LOW_OVERLAP_MASS: "overlap advantage -0.004 looks good while the overlap holds 0.800 of the student's "
    "and 0.850 of the teacher's probability (steps 3-5)",
    AlarmName.CANCELLING_GRADIENTS: "overlap advantage -0.02 (steps 1-5) and -0.04 (steps 31-40) while the gradient "
    "norm went from 1 to 0.4",
    AlarmName.GRADIENT_SPIKE: "gradient norm 3 at step 20, median 0.3 over steps 1-19",
    AlarmName.LENGTH_EXPLOSION: "mean response length 200 (steps 1-5) to 865 tokens (steps 28-30), cut off at the "
    "limit 0.0% to 0.0%",
    AlarmName.EOS_MISMATCH: "log-prob of the sampled EOS -0.10 by the student and -14.00 by the teacher (steps 2-4)",
    AlarmName.SMALL_SUPPORTS: "40.0% of positions have fewer than two ids in their support (steps 1-3)",
    AlarmName.UNIFORM_TEACHER: "at 20.0% of positions the teacher spreads evenly over its vocabulary (step 1)",
}

SILENT: dict[str, tuple[AlarmName, History]] = {
    "overlap that still rises": (AlarmName.OVERLAP_STAGNATING, stalled(**{OVERLAP: ramp(0.6, 0.65, 1, 60)})),
    "an advantage that nears 0": (AlarmName.OVERLAP_STAGNATING, stalled(**{ADVANTAGE: ramp(-0.04, -0.01, 1, 60)})),
    "an entropy gap that narrows": (AlarmName.OVERLAP_STAGNATING, stalled(**{GAP: ramp(0.5, 0.2, 1, 60)})),
    "a run that has converged": (
        AlarmName.OVERLAP_STAGNATING,
        stalled(**{"loss__reverse_kl": lambda step: 0.3 if step < 10 else 0.05}),
    ),
    "too short a run to say": (AlarmName.OVERLAP_STAGNATING, stalled(30)),
    "overlap that holds": (AlarmName.OVERLAP_COLLAPSE, collapsed(**{OVERLAP: 0.9})),
    "a divergence that jumps about": (
        AlarmName.DIVERGENCE_RISING,
        history(15, loss__reverse_kl=lambda step: [0.1, 0.3, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1][step % 10]),
    ),
    "a student that comes down to a sharp teacher": (
        AlarmName.ENTROPY_COLLAPSE,
        history(30, **{STUDENT: ramp(1.0, 0.3, 5, 30), TEACHER: 0.4}),
    ),
    "a poor advantage that needs no second look": (AlarmName.LOW_OVERLAP_MASS, masses(0.8, 0.85, -0.2)),
    "little left to learn": (
        AlarmName.CANCELLING_GRADIENTS,
        history(40, **{ADVANTAGE: ramp(-0.02, -0.002, 5, 30), NORM: ramp(1.0, 0.1, 5, 30)}),
    ),
    "a large advantage with its gradient": (
        AlarmName.CANCELLING_GRADIENTS,
        history(40, **{ADVANTAGE: ramp(-0.02, -0.04, 5, 30), NORM: 1.0}),
    ),
    "a gradient that grew less than its advantage": (
        AlarmName.CANCELLING_GRADIENTS,
        history(40, **{ADVANTAGE: ramp(-0.04, -0.22, 5, 30), NORM: ramp(0.9, 1.5, 5, 30)}),
    ),
    "a spike that is over": (AlarmName.GRADIENT_SPIKE, history(20, **{NORM: lambda step: 3.0 if step == 19 else 0.3})),
    "gradients of exactly 0": (AlarmName.GRADIENT_SPIKE, history(20, **{NORM: 0.0})),
    "the first gradient that is not 0": (
        AlarmName.GRADIENT_SPIKE,
        history(20, **{NORM: lambda step: 0.1 if step == 20 else 0.0}),
    ),
    "nothing usual yet": (AlarmName.GRADIENT_SPIKE, history(8, **{NORM: lambda step: 3.0 if step == 8 else 0.3})),
    "a limit that cut most off from the start": (AlarmName.LENGTH_EXPLOSION, lengths(300.0, 0.8)),
}


def test_every_alarm_has_a_rule_and_every_rule_its_failing_history() -> None:
    assert set(RULES) == set(AlarmName) == set(FAILING) == set(EVIDENCE)
    assert all(rule.remedy for rule in RULES.values())


@pytest.mark.parametrize("name", list(AlarmName))
def test_it_fires_on_its_own_kind_of_failure_alone(name: AlarmName) -> None:
    finding = find(name, FAILING[name], AlarmSettings())
    assert finding is not None and finding.evidence == EVIDENCE[name]
    assert finding.numbers and all(isinstance(number, float) for number in finding.numbers.values())
    others = [other for other in AlarmName if other is not name]
    assert [other for other in others if find(other, FAILING[name], AlarmSettings()) is not None] == []


@pytest.mark.parametrize("case", SILENT)
def test_it_is_silent_on(case: str) -> None:
    name, records = SILENT[case]
    assert find(name, records, AlarmSettings()) is None


def raised(run: str, *overrides: str) -> list[tuple[int, AlarmName]]:
    """What a measured run raises, step by step."""
    watch = AlarmWatch(load_settings(AlarmSettings, None, overrides))
    return [(alarm.step, alarm.name) for record in measured(run) for alarm in watch.observe(record).raised]


def test_a_healthy_run_is_silent_from_its_first_step_to_its_last() -> None:
    records = measured("healthy")
    assert len(records) == 70 and records[-1]["loss/reverse_kl"] < records[0]["loss/reverse_kl"] / 2
    assert raised("healthy") == []


def test_a_healthy_run_is_silent_to_shorter_windows_and_smaller_buckets_too() -> None:
    windows = [f"{name}.window_steps=12" for name in ("overlap_collapse", "gradient_spike")]
    windows.append("overlap_stagnating.window_steps=24")
    assert raised("healthy", *windows, "overlap_collapse.min_positions=1") == []


def test_a_run_that_learned_nothing_is_told_as_soon_as_its_window_is_full() -> None:
    """Advantage and entropy gap went 20 % down by chance: which prompts a step had, not what was learned."""
    assert raised("stalled") == [(40, AlarmName.OVERLAP_STAGNATING)]
    window = "overlap_stagnating.window_steps=24"
    assert raised("stalled", window) == [(24, AlarmName.OVERLAP_STAGNATING)]


def test_a_run_that_its_teacher_misled_is_told_long_before_the_windows_are_full() -> None:
    """Overlap stayed at 0.58 while the shared ids lost their mass, and accuracy went from 0.4 to 0.1."""
    assert raised("misled") == [(22, AlarmName.DIVERGENCE_RISING), (40, AlarmName.OVERLAP_STAGNATING)]


@pytest.mark.parametrize("name", list(AlarmName))
def test_a_run_without_the_metrics_is_silent(name: AlarmName) -> None:
    assert find(name, history(60, timing__step=1.0), AlarmSettings()) is None
    assert find(name, History(), AlarmSettings()) is None


def test_a_collapse_that_does_not_begin_at_the_back_is_another_matter() -> None:
    uniform = history(60, **{OVERLAP: ramp(0.9, 0.7, 50, 60)})
    with_entropies(uniform, lambda step: [ramp(0.4, 2.5, 50, 60)(step)] * 4)
    assert find(AlarmName.OVERLAP_COLLAPSE, uniform, AlarmSettings()) is None
    unknown = history(60, **{OVERLAP: ramp(0.9, 0.7, 50, 60)})
    assert find(AlarmName.OVERLAP_COLLAPSE, unknown, AlarmSettings()) is None


def test_buckets_with_few_positions_say_nothing() -> None:
    found = collapsed()
    with_entropies(found, lambda step: [0.4, 0.4, None, ramp(0.4, 2.5, 50, 60)(step)], count=20.0)
    assert find(AlarmName.OVERLAP_COLLAPSE, found, AlarmSettings()) is None


def test_most_responses_cut_off_is_an_explosion_even_where_the_limit_hides_the_length() -> None:
    finding = find(
        AlarmName.LENGTH_EXPLOSION, lengths(ramp(300.0, 320.0, 5, 30), ramp(0.05, 0.9, 5, 25)), AlarmSettings()
    )
    assert finding is not None and "5.0% to 90.0%" in finding.evidence


def test_coherence_is_told_where_it_is_measured() -> None:
    records = FAILING[AlarmName.CANCELLING_GRADIENTS].records
    again = History([{**record, "distill/gradient_coherence": 0.125} for record in records])
    finding = find(AlarmName.CANCELLING_GRADIENTS, again, AlarmSettings())
    assert finding is not None and finding.evidence.endswith("gradient coherence 0.125 at step 40")
