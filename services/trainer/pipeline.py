"""How sampling, scoring and training of a step overlap. Light: no torch."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from opd.settings import Settings

MAX_POLICY_LAG = 2


class PipelineMode(StrEnum):
    STREAMING = "streaming"
    """Rollouts are trained as their scores return."""
    SEQUENTIAL = "sequential"
    """Training begins when every rollout of the step has been scored."""


class PipelineSettings(Settings):
    """What waits for what; the gradient of a step is the same in every mode, up to rounding."""

    mode: PipelineMode = PipelineMode.STREAMING
    """`streaming` or `sequential`."""
    max_policy_lag: Annotated[int, Field(ge=0, le=MAX_POLICY_LAG)] = 0
    """Steps by which sampling may run ahead of training: 0 is strictly on-policy; 1 or 2 hide a slow teacher and want
    `objective.staleness_cap`."""


def check_pipeline(
    pipeline: PipelineSettings, *, staleness_cap: float | None, deterministic: bool, needs_head: bool
) -> None:
    """Raises `ValueError` naming the two settings that contradict each other, and the way out."""
    lag = pipeline.max_policy_lag
    if not lag:
        return
    if pipeline.mode is PipelineMode.SEQUENTIAL:
        raise ValueError(
            f"pipeline.max_policy_lag={lag} with mode=sequential: sampling ahead is what that mode does without; set "
            "pipeline.mode=streaming or max_policy_lag=0"
        )
    if deterministic:
        raise ValueError(
            f"pipeline.max_policy_lag={lag} with deterministic=true: a run that goes on after --resume would sample "
            "other rollouts than one that was never stopped; set one of them back"
        )
    if needs_head:
        raise ValueError(
            f"pipeline.max_policy_lag={lag} with objective.kind=full_vocabulary: hidden states of one teacher "
            "could meet the output head of its successor; set max_policy_lag=0 or another kind"
        )
    if staleness_cap is None:
        raise ValueError(
            f"pipeline.max_policy_lag={lag}: rollouts of older weights train with the staleness weight; set "
            "objective.staleness_cap (2.0, say), or max_policy_lag=0"
        )
