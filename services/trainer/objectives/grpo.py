"""Reinforcement learning from verified answers alone (A.1, Table 1): no teacher, no KL term, no clipping.

With `aggregation = token_mean` every token of the step counts the same, however long its response is.
"""

from services.trainer.objectives.config import ObjectiveConfig
from services.trainer.objectives.outcome import Outcome


def build(config: ObjectiveConfig) -> Outcome:
    del config
    return Outcome()
