"""What the student is trained on: pure functions from log-probs and masks to a loss.

Start with `contract.py` (inputs, outputs and the protocol of a term), then `top_k.py`, then `objective.py`, which adds
terms up. Configuration needs no torch; `build_objective` in `dispatch.py` does.

A new kind is one file and one test: a module here that is named as the kind, with one class that says what it `needs`
and gives one loss per position, and `build(config)`, which makes it. Its name joins `ObjectiveKind`; dispatch finds it.
"""

from services.trainer.objectives.config import (
    Aggregation,
    Credit,
    Divergence,
    GradientForm,
    HorizonConfig,
    ObjectiveConfig,
    ObjectiveKind,
    OutcomeConfig,
    OutcomeRegion,
    Support,
    SupportWeight,
    Tail,
)

__all__ = [
    "Aggregation",
    "Credit",
    "Divergence",
    "GradientForm",
    "HorizonConfig",
    "ObjectiveConfig",
    "ObjectiveKind",
    "OutcomeConfig",
    "OutcomeRegion",
    "Support",
    "SupportWeight",
    "Tail",
]
