"""What a client of the queue grants it, and what it counts."""

from dataclasses import dataclass

MEMORY_FRACTION = 0.7
"""Share of Redis's maxmemory above which nothing is admitted, unless a client says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientRules:
    """What a client grants the queue."""

    heartbeat_ms: int = 60_000
    """A trainer silent for so long counts as gone and its requests are dropped."""
    sweep_s: float = 15.0
    """How often open rollouts are looked up even when nothing seems wrong."""
    admission_timeout_s: float = 600.0
    """How long a request may wait for room in the queue."""
    deadline_grace_s: float = 2.0
    """Waited beyond a request's own time-out, for the queue to tell first."""
    max_attempts: int = 8
    """Submissions of one rollout after retryable errors."""
    max_body_bytes: int = 64 * 2**20
    max_reply_bytes: int = 64 * 2**20
    memory_fraction: float = MEMORY_FRACTION
    """Share of Redis's maxmemory above which nothing is admitted."""


@dataclass(kw_only=True, slots=True)
class ClientStats:
    """Counts of one client, for its metrics.

    `sent`, `scored` and `failed` count rollouts, `resubmitted` further attempts, `duplicates` replies to a rollout
    that had its reply already, or that nobody waited for any more.
    """

    sent: int = 0
    scored: int = 0
    failed: int = 0
    resubmitted: int = 0
    duplicates: int = 0
