"""How long a step has to take: stages of known duration, nothing in between, every stage as early as it can be.

One machine samples and trains, another scores, one rollout at a time in the order they end in. Times are seconds from
the beginning of a run.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutLoad:
    """What one rollout costs each stage, in seconds."""

    ends: float
    """Since the step's sampling began, where nothing holds it up."""
    scoring: float
    training: float


StepLoad = Sequence[RolloutLoad]
"""In the order in which they end."""


def end_times(lengths: Sequence[int], slots: int, step_s: float) -> list[float]:
    """When each response ends that begins in the first free slot, one token every `step_s`, by index."""
    free = [0.0] * min(slots, len(lengths))
    ends = []
    for length in lengths:
        end = heapq.heappop(free) + length * step_s
        heapq.heappush(free, end)
        ends.append(end)
    return ends


def sampling_s(load: StepLoad) -> float:
    """Of the whole step."""
    return load[-1].ends


def sequential_steps(loads: Sequence[StepLoad]) -> list[float]:
    """Each step's duration where training waits for all scores."""
    durations = []
    for load in loads:
        scored = _scored(load, begins=0.0, teacher_free=0.0)
        begins = max(sampling_s(load), scored[-1])
        durations.append(begins + sum(item.training for item in load))
    return durations


def streaming_steps(loads: Sequence[StepLoad], *, lag: int = 0) -> list[float]:
    """Each step's duration where every rollout is trained as early as its score and the machine allow.

    The machine samples first, `lag` steps ahead, and then trains.
    """
    now = teacher_free = 0.0
    ahead: list[tuple[StepLoad, list[float]]] = []
    durations = []
    for step in range(len(loads)):
        begun = now
        while len(ahead) <= min(lag, len(loads) - 1 - step):
            load = loads[step + len(ahead)]
            scored = _scored(load, begins=now, teacher_free=teacher_free)
            teacher_free = scored[-1]
            now += sampling_s(load)
            ahead.append((load, scored))
        now = _trained(*ahead.pop(0), free=now)
        durations.append(now - begun)
    return durations


def elsewhere_steps(loads: Sequence[StepLoad]) -> list[float]:
    """As `streaming_steps`, with a third machine that samples."""
    durations = []
    for load in loads:
        scored = _scored(load, begins=0.0, teacher_free=0.0)
        durations.append(max(sampling_s(load), _trained(load, scored, free=0.0)))
    return durations


def _scored(load: StepLoad, *, begins: float, teacher_free: float) -> list[float]:
    """When the teacher is done with each."""
    done = []
    for item in load:
        teacher_free = max(teacher_free, begins + item.ends) + item.scoring
        done.append(teacher_free)
    return done


def _trained(load: StepLoad, scored: Sequence[float], *, free: float) -> float:
    """When the last one is trained by a machine that is free at `free`: first come, first served is the shortest."""
    for item, ready in zip(load, scored, strict=True):
        free = max(free, ready) + item.training
    return free
