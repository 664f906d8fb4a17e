"""What the student is trained on: pure functions from log-probs and masks to a loss.

Start with `contract.py` (inputs and output), then `top_k.py`. Configuration needs no torch; `build_objective` in
`dispatch.py` does. A new objective is one file with one class, one line in `dispatch.py` and one test.
"""

from services.trainer.objectives.config import (
    Aggregation,
    GradientForm,
    ObjectiveConfig,
    ObjectiveKind,
    Support,
    SupportWeight,
)

__all__ = ["Aggregation", "GradientForm", "ObjectiveConfig", "ObjectiveKind", "Support", "SupportWeight"]
