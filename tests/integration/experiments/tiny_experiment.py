"""An experiment of two steps on a few problems, run as `python tiny_experiment.py WORK_DIR RESULTS_DIR STEPS`."""

import sys
from pathlib import Path

from rich.console import Console

from experiments.arms import Arm, Evaluation
from experiments.claims import Check, Claim
from experiments.experiment import Experiment
from experiments.findings import Findings
from experiments.panels import OVERLAP, Accuracies, ByPosition
from experiments.running import run_experiments

TINY = Evaluation(num_problems=3, num_samples=2, max_response_tokens=96)


def tiny_arm(steps: int) -> Arm:
    settings = {"steps": steps, "optim.warmup_steps": 0, "rollout.prompts_per_step": 2}
    return Arm(student="student-base", teacher="teacher-post", settings=settings, evaluation=TINY, minutes=3.0)


def claims(found: Findings) -> list[Claim]:
    arm = found.arms["tiny"]
    check = Check(what="gain", estimate=arm.gain(), low=-2.0, start=arm.before())
    return [Claim(statement="A gain is larger than -2.", section="0", checks=[check])]


def tiny_experiment(steps: int) -> Experiment:
    return Experiment(
        name="tiny",
        title="a tiny arm",
        figures="Fig 0",
        section="0",
        setting="One arm of a few steps.",
        arms={"tiny": tiny_arm(steps)},
        claims=claims,
        panels=(Accuracies(), OVERLAP, ByPosition(metric="distill/entropy_student", title="Entropy", y_label="nats")),
    )


if __name__ == "__main__":
    work_dir, results, num_steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    sys.exit(
        run_experiments(
            [tiny_experiment(num_steps)], work_dir=work_dir, minutes=None, console=Console(stderr=True), results=results
        )
    )
