"""One figure of the paper as a definition, and how definitions are found by name.

A folder `experiments/NAME` with an `experiment.py` that holds EXPERIMENT is an experiment; nothing else registers it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from experiments.arms import Arm, Command, makers, needs
from experiments.claims import Claim
from experiments.findings import Findings
from experiments.panels import Panel
from opd.errors import ConfigError

FOLDER = Path(__file__).parent
EVERYTHING = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """Arms and commands to run, claims to judge and panels to draw."""

    name: str
    title: str
    figures: str
    """Of the paper, such as "Figs 2, 3, 17"."""
    section: str
    setting: str
    """What stands in for what, in one or two sentences."""
    arms: Mapping[str, Arm]
    """By the label they have in the figure."""
    claims: Callable[[Findings], Sequence[Claim]]
    panels: Sequence[Panel]
    reports: Mapping[str, Command] = field(default_factory=dict)
    """Commands whose JSON report is measured."""
    caveat: str = ""
    """What a reader of the verdicts has to know, such as a setting that was chosen in sight of what is claimed."""

    def makers(self) -> list[Arm | Command]:
        """Everything to run, what others rest on first, each once."""
        found: list[Arm | Command] = []
        ends: list[Arm | Command] = [*self.arms.values(), *self.reports.values()]
        for model in ends:
            found += [maker for maker in makers(model) if maker not in found]
        return found

    def needs(self) -> set[str]:
        """Parts of the trainer beyond plain distillation."""
        return set().union(*(needs(maker) for maker in self.makers()))


def names() -> list[str]:
    """Of all experiments."""
    return sorted(path.parent.name for path in FOLDER.glob("*/experiment.py"))


def load(name: str) -> Experiment:
    """The experiment of this name; `ConfigError` naming the choices otherwise."""
    if name not in names():
        raise ConfigError(f"experiment {name}: there is none; choose {EVERYTHING} or one of {', '.join(names())}")
    experiment: Experiment = import_module(f"experiments.{name}.experiment").EXPERIMENT
    return experiment
