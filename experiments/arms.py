"""What experiments are made of: training runs (arms), commands of `opd`, and the models that both start from.

All of it is description: nothing here runs, and two experiments that describe the same arm share its one run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

SEEDS = (0, 1, 2)
MAX_MINUTES_OF_SEVERAL_SEEDS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How a model is graded: avg@n with the paper's sampling, on problems of the testbed it was not trained on."""

    data: str = "heldout.jsonl"
    """A file of `testbed/data`."""
    num_problems: int = 128
    num_samples: int = 16
    temperature: float = 0.7
    top_p: float = 0.95
    max_response_tokens: int = 320
    template: str | None = None
    """Asks every question in this template; None leaves prompts as they are in the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One configuration of a real training run. Example: ``Arm(student="student-base", teacher="teacher-post")``."""

    student: "Model"
    teacher: "Model | None"
    """None where answers are verified and nobody scores."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted settings of the trainer that differ from `base.toml`, such as ``{"objective.gradient": "exact"}``."""
    data: tuple[str, ...] = ("train.jsonl",)
    """Files of `testbed/data` that hold the prompts."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """Of the trained student, of the student before and of the teacher, if any."""
    minutes: float = 1.5
    """Of training and evaluation with one seed, on two cores that have nothing else to do."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Three where a run takes under two minutes, else one."""
        return SEEDS if self.minutes <= MAX_MINUTES_OF_SEVERAL_SEEDS else SEEDS[:1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """An `opd` command whose product is a model or a JSON report, run once for all who name it.

    In `arguments`, `{student}` and `{teacher}` stand for model folders, `{pool}` and `{redis_url}` for the teacher as
    it is served, `{data}` for the folder of problem files, `{output}` for that of the products, `{samples}` for a
    cache that all commands share.
    """

    name: str
    """Of the subcommand, such as ``cold-start``."""
    arguments: tuple[str, ...]
    student: "Model"
    teacher: "Model"
    product: str
    """What it leaves in `{output}`: the path of a model folder or of a JSON file."""
    minutes: float


Model: TypeAlias = str | Arm | Command
"""A bundled model by name, what an arm has trained (its first seed), or what a command has made."""


def name_of(model: Model) -> str:
    """For people: `student-base`, `student-base after grpo`, `student-base after opd cold-start`."""
    if isinstance(model, str):
        return model
    if isinstance(model, Command):
        return f"{name_of(model.student)} after opd {model.name}"
    made_by = f"distillation from {name_of(model.teacher)}" if model.teacher else model.settings["objective.kind"]
    return f"{name_of(model.student)} after {made_by}"


def makers(model: Model | None) -> Iterator[Arm | Command]:
    """Everything that has to run before `model` exists, in order."""
    if model is None or isinstance(model, str):
        return
    yield from makers(model.student)
    yield from makers(model.teacher)
    yield model


def needs(model: Model) -> set[str]:
    """The parts of the trainer that the making of `model` rests on beyond plain distillation."""
    found = set()
    for maker in makers(model):
        if isinstance(maker, Command):
            found.add(f"opd {maker.name}")
        elif "objective.kind" in maker.settings:
            found.add(f"objective.kind={maker.settings['objective.kind']}")
    return found
