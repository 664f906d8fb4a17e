"""Results know what they are of."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.arms import Arm, Command, Evaluation
from experiments.experiment import Experiment, load
from experiments.findings import findings_of
from experiments.results import collect, is_as_defined
from experiments.store import Store, evaluations_of
from services.trainer.run_log import METRICS_FILE
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


def test_what_a_store_holds_is_as_defined_when_written_and_read_again(tmp_path: Path) -> None:
    store, experiment = (
        Store(folder=tmp_path / "store"),
        replace(EXPERIMENT, arms={LABEL: ARM}, reports={REPORT: COMMAND}),
    )
    for job in evaluations_of(ARM):
        write(store.evaluation_file(*job), {"accuracy_by_problem": [0.5, 1.0], "by_level": {}})
    for seed in ARM.seeds:
        write(store.run_folder(ARM, seed) / METRICS_FILE, {"step": 1, "loss/objective": 0.5})
    write(store.command_folder(COMMAND) / COMMAND.product, {"teachers": []})
    findings = collect(experiment, store)
    assert is_as_defined(experiment, findings)
    again = findings_of(json.loads(json.dumps(findings.as_json())))
    assert again == findings and is_as_defined(experiment, again)


def write(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
