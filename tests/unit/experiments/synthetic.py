"""Findings of the form that real runs leave, with numbers drawn from a seed: for claims, figures and pages."""

from typing import Any

import numpy as np

from experiments.arms import name_of
from experiments.experiment import Experiment
from experiments.findings import BY_POSITION, METRICS, ArmFindings, Findings, Run
from experiments.keys import command_key, run_key
from experiments.store import evaluation_keys_of

NUM_STEPS, NUM_PROBLEMS = 32, 16
EDGES = [0.0, 16.0, 32.0, 64.0, 128.0]


def synthetic_findings(experiment: Experiment, seed: int = 0) -> Findings:
    """Every arm with its seeds and every report; all metrics in 0.1 to 0.9."""
    random = np.random.default_rng(seed)
    arms = {
        label: ArmFindings(
            student=name_of(arm.student),
            teacher=name_of(arm.teacher) if arm.teacher else None,
            settings=dict(arm.settings),
            runs=[synthetic_run(random, run_seed, run_key(arm, run_seed)) for run_seed in arm.seeds],
            before_by_problem=random.uniform(0.3, 0.5, NUM_PROBLEMS).tolist(),
            teacher_by_problem=random.uniform(0.8, 1.0, NUM_PROBLEMS).tolist() if arm.teacher else None,
            evaluation_keys=evaluation_keys_of(arm),
        )
        for label, arm in experiment.arms.items()
    }
    return Findings(
        arms=arms,
        reports={label: synthetic_report(random) for label in experiment.reports},
        report_keys={label: command_key(command) for label, command in experiment.reports.items()},
    )


def synthetic_run(random: np.random.Generator, seed: int, key: str) -> Run:
    rows = random.uniform(0.1, 0.9, (5, len(EDGES))).tolist()
    return Run(
        seed=seed,
        key=key,
        steps=list(range(1, NUM_STEPS + 1)),
        series={name: random.uniform(0.1, 0.9, NUM_STEPS).tolist() for name in METRICS},
        by_position={name: {"first": rows[:3], "last": rows} for name in BY_POSITION},
        position_edges=EDGES,
        accuracy_by_problem=random.uniform(0.4, 0.9, NUM_PROBLEMS).tolist(),
        accuracy_by_level={"1": 0.9, "2": 0.5},
    )


def synthetic_report(random: np.random.Generator) -> dict[str, Any]:
    """What both studies leave, in one: a claim reads what it knows."""
    gains = [{"value": value, "low": value - 0.05, "high": value + 0.05} for value in random.uniform(0, 0.4, 3)]
    return {
        "depths": [{"depth": depth, "gain": gain} for depth, gain in zip((16, 64, 256), gains, strict=True)],
        "decline": {"value": 0.1, "low": 0.05, "high": 0.15},
        "teachers": [
            {"auroc": {"value": 0.7, "low": 0.6, "high": 0.8}, "rewards": random.normal(0, 1, 64).tolist()},
        ],
        "is_correct": [index % 3 == 0 for index in range(64)],
        "problems": [index // 4 for index in range(64)],
    }
