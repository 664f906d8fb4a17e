"""Where finished work lies and whether it is there: one folder of runs, evaluations and command products by key."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.arms import Arm, Command, Evaluation, Model, name_of
from experiments.findings import ArmFindings, Run, run_of
from experiments.keys import command_key, evaluation_key, run_key
from services.trainer.run_log import SUMMARY_FILE, read_steps
from testbed.stack import MODELS, latest_checkpoint

MADE = "made.json"
"""Written into a command's folder once it has ended well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """Reads, and names the places to write to."""

    folder: Path

    def run_folder(self, arm: Arm, seed: int) -> Path:
        return self.folder / "runs" / run_key(arm, seed)

    def command_folder(self, command: Command) -> Path:
        return self.folder / "commands" / command_key(command)

    def evaluation_file(self, model: Model, evaluation: Evaluation, seed: int | None = None) -> Path:
        """Of an arm's given seed; of a model as others start from it where there is none."""
        return self.folder / "evaluations" / f"{evaluation_key(model, evaluation, seed)}.json"

    def model_folder(self, model: Model, seed: int | None = None) -> Path:
        """Where the weights are, or will be once they are made."""
        if isinstance(model, str):
            return MODELS / model
        if isinstance(model, Command):
            return self.command_folder(model) / model.product
        return latest_checkpoint(self.run_folder(model, model.seeds[0] if seed is None else seed))

    def is_trained(self, arm: Arm, seed: int) -> bool:
        summary = self.run_folder(arm, seed) / SUMMARY_FILE
        return summary.is_file() and _read(summary)["state"] == "finished"

    def is_made(self, command: Command) -> bool:
        return (self.command_folder(command) / MADE).is_file()

    def is_graded(self, arm: Arm) -> bool:
        """Whether the arm's every evaluation is there."""
        return all(self.evaluation_file(*job).is_file() for job in evaluations_of(arm))

    def is_finished(self, maker: Arm | Command) -> bool:
        if isinstance(maker, Command):
            return self.is_made(maker)
        return all(self.is_trained(maker, seed) for seed in maker.seeds) and self.is_graded(maker)

    def report(self, command: Command) -> dict[str, Any]:
        """The JSON that a command has left."""
        return _read(self.command_folder(command) / command.product)

    def findings(self, arm: Arm) -> ArmFindings:
        """A finished arm in numbers."""

        def by_problem(model: Model) -> list[float]:
            return list(_read(self.evaluation_file(model, arm.evaluation))["accuracy_by_problem"])

        return ArmFindings(
            student=name_of(arm.student),
            teacher=name_of(arm.teacher) if arm.teacher else None,
            settings=dict(arm.settings) | {"data.files": list(arm.data)},
            runs=[self._run(arm, seed) for seed in arm.seeds],
            before_by_problem=by_problem(arm.student),
            teacher_by_problem=by_problem(arm.teacher) if arm.teacher else None,
            evaluation_keys=evaluation_keys_of(arm),
        )

    def _run(self, arm: Arm, seed: int) -> Run:
        records = read_steps(self.run_folder(arm, seed))
        return run_of(seed, run_key(arm, seed), records, _read(self.evaluation_file(arm, arm.evaluation, seed)))


def evaluations_of(arm: Arm) -> list[tuple[Model, Evaluation, int | None]]:
    """Every evaluation an arm is judged by: of its student before, its teacher and each seed of itself."""
    others = [model for model in (arm.student, arm.teacher) if model is not None]
    return [*((model, arm.evaluation, None) for model in others), *((arm, arm.evaluation, seed) for seed in arm.seeds)]


def evaluation_keys_of(arm: Arm) -> list[str]:
    """Of `evaluations_of`."""
    return [evaluation_key(*job) for job in evaluations_of(arm)]


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
