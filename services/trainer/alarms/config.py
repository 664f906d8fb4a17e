"""The section `[alarms]`: which alarms there are, what they do, and from where on they are one.

Steps count optimizer steps; a window is how many of the last ones a rule looks back over. The start of a run is its
first five steps, the present its last three.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from opd.settings import Settings
from services.trainer.alarms.contract import AlarmName

Steps = Annotated[int, Field(ge=9)]
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=1, allow_inf_nan=False)]


class StagnationSettings(Settings):
    """`overlap_stagnating`: from the first to the last third of the window."""

    window_steps: Steps = 40
    """Nothing is said before."""
    min_gain: Positive = 0.005
    """Of the overlap ratio; less is standing still."""
    min_improvement: Share = 0.1
    """Share by which advantage and entropy gap must have come nearer to 0; less is standing still."""
    min_divergence: Share = 0.5
    """Of the reverse KL at the start; a run that is below it has learned and may stand still."""


class CollapseSettings(Settings):
    """`overlap_collapse`: from the best three steps of the window to the present."""

    window_steps: Steps = 50
    """How far back the best steps may be."""
    min_drop: Share = 0.03
    """Of the overlap ratio."""
    min_rise: Positive = 0.2
    """Share by which the student's entropy in the last bucket of positions has risen, and more than in the first."""
    min_positions: Annotated[int, Field(ge=1)] = 100
    """Buckets with fewer positions, then or now, are not looked at."""


class DivergenceSettings(Settings):
    """`divergence_rising`: the present ten steps against the start."""

    factor: Factor = 1.5
    """Times the reverse KL at the start."""


class EntropySettings(Settings):
    """`entropy_collapse`"""

    max_share: Share = 0.5
    """Of the lower of both models' entropies at the start."""


class MassSettings(Settings):
    """`low_overlap_mass`"""

    max_advantage: Positive = 0.02
    """Magnitude of the overlap-token advantage (eq 7) up to which it looks good."""
    min_mass: Share = 0.9
    """Of either model on the overlap; the paper's runs have 0.97 to 0.99."""


class CancellingSettings(Settings):
    """`cancelling_gradients`: the present ten steps against the start."""

    min_advantage: Positive = 0.8
    """Share of the advantage's magnitude at the start that is still there."""
    max_ratio: Share = 0.3
    """Of gradient norm per advantage at the start."""


class SpikeSettings(Settings):
    """`gradient_spike`"""

    window_steps: Steps = 20
    """Steps whose median is the usual norm."""
    factor: Factor = 5.0
    """Times the usual norm."""


class LengthSettings(Settings):
    """`length_explosion`"""

    factor: Factor = 2.0
    """Times the length at the start."""
    max_truncated: Share = 0.5
    """Share of responses cut off at the limit, where it was less than half as many at the start."""


class EosSettings(Settings):
    """`eos_mismatch`"""

    max_gap_nats: Positive = 3.0
    """By which the student's log-prob of its EOS may be above the teacher's."""


class SupportSettings(Settings):
    """`small_supports`"""

    max_fraction: Share = 0.05
    """Of positions with fewer than two ids."""


class UniformSettings(Settings):
    """`uniform_teacher`"""

    max_fraction: Share = 0.01
    """Of positions."""


class AlarmSettings(Settings):
    """What is watched while a run trains."""

    enabled: bool = True
    """Whether anything is watched."""
    off: tuple[AlarmName, ...] = ()
    """Alarms that are not watched."""
    stop: tuple[AlarmName, ...] = ()
    """Alarms that end the run, after its last step is saved."""
    shorten: tuple[AlarmName, ...] = ()
    """Alarms that halve the supervised horizon, where the run has one; it stays below until they are over."""
    rearm_steps: Annotated[int, Field(ge=1)] = 10
    """An alarm is over, and may be raised again, when its rule has been silent for this many steps."""
    overlap_stagnating: StagnationSettings = Field(default_factory=StagnationSettings)
    overlap_collapse: CollapseSettings = Field(default_factory=CollapseSettings)
    divergence_rising: DivergenceSettings = Field(default_factory=DivergenceSettings)
    entropy_collapse: EntropySettings = Field(default_factory=EntropySettings)
    low_overlap_mass: MassSettings = Field(default_factory=MassSettings)
    cancelling_gradients: CancellingSettings = Field(default_factory=CancellingSettings)
    gradient_spike: SpikeSettings = Field(default_factory=SpikeSettings)
    length_explosion: LengthSettings = Field(default_factory=LengthSettings)
    eos_mismatch: EosSettings = Field(default_factory=EosSettings)
    small_supports: SupportSettings = Field(default_factory=SupportSettings)
    uniform_teacher: UniformSettings = Field(default_factory=UniformSettings)

    @property
    def watched(self) -> tuple[AlarmName, ...]:
        """Every alarm that may be raised."""
        return tuple(name for name in AlarmName if self.enabled and name not in self.off)

    @model_validator(mode="after")
    def _check_actions(self) -> Self:
        for field in ("stop", "shorten"):
            idle = [name for name in getattr(self, field) if name not in self.watched]
            if idle:
                raise ValueError(
                    f"alarms.{field}={', '.join(idle)}: is not watched, so it would do nothing; take it out of "
                    "alarms.off, or set alarms.enabled=true"
                )
        return self
