"""Results know what they are of."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from experiments.arms import Arm, Command, Evaluation
from experiments.experiment import Experiment, load
from experiments.results import is_as_defined
from tests.unit.experiments.synthetic import synthetic_findings

EXPERIMENT = load("fig14_reward_auroc")
FOUND = synthetic_findings(EXPERIMENT)
LABEL, ARM = next(iter(EXPERIMENT.arms.items()))
REPORT, COMMAND = next(iter(EXPERIMENT.reports.items()))


def with_arm(arm: Arm) -> Mapping[str, Arm]:
    return {**EXPERIMENT.arms, LABEL: arm}


def with_report(command: Command) -> Mapping[str, Command]:
    return {**EXPERIMENT.reports, REPORT: command}


def test_results_are_of_the_definition_that_they_were_made_with() -> None:
    assert is_as_defined(EXPERIMENT, FOUND)
    assert is_as_defined(replace(EXPERIMENT, title="another", arms=with_arm(replace(ARM, minutes=1.9))), FOUND)


@pytest.mark.parametrize(
    "changed",
    [
        replace(EXPERIMENT, arms=with_arm(replace(ARM, settings={"optim.lr": 1e-4}))),
        replace(EXPERIMENT, arms=with_arm(replace(ARM, evaluation=Evaluation(template="boxed")))),
        replace(EXPERIMENT, arms=with_arm(replace(ARM, evaluation=Evaluation(num_problems=64)))),
        replace(EXPERIMENT, reports=with_report(replace(COMMAND, arguments=(*COMMAND.arguments, "--num-samples=4")))),
        replace(EXPERIMENT, reports={REPORT: COMMAND}),
    ],
    ids=["settings", "template of the grading", "problems graded", "arguments of a command", "a report less"],
)
def test_whatever_has_changed_makes_results_stale(changed: Experiment) -> None:
    assert not is_as_defined(changed, FOUND)
