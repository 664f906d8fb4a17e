"""How the processes of one run work together (`[distributed]`). Light: no torch."""

from typing import Annotated

from pydantic import Field

from opd.settings import Settings

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DistributedSettings(Settings):
    """Only read where torchrun has started several processes."""

    collective_timeout_s: Seconds = 7200.0
    """How long a rank waits for the others at one place: at least a step's sampling, and an evaluation."""
    silence_s: Seconds = 60.0
    """How long a rank may show no sign of life before the others end."""
    reduces_each_round: bool = True
    """Sums gradients over ranks after each micro-batch, so that each holds a shard of them; false sums once a step and
    holds a whole gradient in fp32 on each."""
