"""How a new version of the student reaches the rollout engine.

An engine in this process samples from the very module that is trained, so there is nothing to copy: publishing is the
stamp that rollouts carry. An engine elsewhere needs a publisher of its own with the same one method.
"""

from typing import Protocol

from services.trainer.rollout.base import RolloutEngine


class WeightPublisher(Protocol):
    """Makes the engine sample from the weights as they are now."""

    def publish(self, policy_version: int) -> None:
        """Returns when the next rollout will come from this version."""
        ...


class SharedWeights:
    """For an engine that holds the student's own module."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def publish(self, policy_version: int) -> None:
        self._engine.policy_version = policy_version
