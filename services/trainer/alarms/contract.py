"""What a rule finds, and what an alarm says."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class AlarmName(StrEnum):
    OVERLAP_STAGNATING = "overlap_stagnating"
    """Overlap, advantage and entropy gap stand still while the divergence is still there."""
    OVERLAP_COLLAPSE = "overlap_collapse"
    """Overlap drops sharply and the student's entropy rises from the back of the response."""
    DIVERGENCE_RISING = "divergence_rising"
    """The student moves away from the teacher it is trained on."""
    ENTROPY_COLLAPSE = "entropy_collapse"
    """The student's entropy is a fraction of what both models began with."""
    LOW_OVERLAP_MASS = "low_overlap_mass"
    """The shared ids look well matched and hold little probability."""
    CANCELLING_GRADIENTS = "cancelling_gradients"
    """Advantages stay large while the gradient shrinks."""
    GRADIENT_SPIKE = "gradient_spike"
    """One gradient is many times the usual one."""
    LENGTH_EXPLOSION = "length_explosion"
    """Responses grow far beyond their first length, or most are cut off."""
    EOS_MISMATCH = "eos_mismatch"
    """The teacher would not end responses where, or with what, the student ends them."""
    SMALL_SUPPORTS = "small_supports"
    """Many positions have fewer than two ids to learn from."""
    UNIFORM_TEACHER = "uniform_teacher"
    """The teacher spreads evenly over its vocabulary."""


OF_A_TEACHER = frozenset(AlarmName) - {
    AlarmName.ENTROPY_COLLAPSE,
    AlarmName.GRADIENT_SPIKE,
    AlarmName.LENGTH_EXPLOSION,
}
"""Never raised in a run without a teacher, which has none of the metrics they look at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a rule saw. Example: `Finding(evidence="gradient norm 4.1 at step 30, ...", numbers={"norm": 4.1, ...})`."""

    evidence: str
    """One line with numbers and steps."""
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """A finding that began at `step`, with the way out."""

    name: AlarmName
    step: int
    evidence: str
    numbers: Mapping[str, float]
    remedy: str
    section: str
    """Of the paper; empty where the paper has no remedy and it is ours."""

    @property
    def line(self) -> str:
        """For people."""
        source = f" (paper {self.section})" if self.section else ""
        return f"alarm {self.name} at step {self.step}: {self.evidence}; {self.remedy}{source}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"name": str(self.name), "numbers": dict(self.numbers)}
