"""What is measured of a step and how often: the section `[metrics]`."""

from typing import Annotated

from pydantic import Field

from opd.settings import Settings


class MetricsSettings(Settings):
    """How much of the costly diagnostics a run pays for."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a step's rollouts that whatever compares the k ids is measured on: overlap, masses, eq 5, extreme gaps.
    Drawn anew at every step by the run's seed; entropies, rewards and outcomes are always of all rollouts. Where the
    rollout engine does not record the student's log-probs and entropies, only these rollouts have them."""
    coherence_every_steps: Annotated[int, Field(ge=0)] = 10
    """How often `distill/gradient_coherence` is measured, the run's first step included; 0 means never. Costs a forward
    and backward pass over the probe and, for its duration, memory for two more copies of the gradient; with
    `objective.kind=full_vocabulary` the probe keeps its hidden states too."""
    coherence_rollouts: Annotated[int, Field(ge=8, le=32)] = 16
    """Rollouts of the probe, kept from the first step, one of each prompt before a second of any."""
