"""What a pool looks like from its queue: backlog, ages, leases, replicas. Works while no replica runs."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from opd.errors import OpdError
from opd.queue.connection import QueueConnection
from opd.queue.keys import GROUP, PoolKeys, check_pool
from opd.queue.pools import LiveReplica, live_replicas
from opd.wire.messages import decode_info

OUTCOMES = ("delivered", "completed", "failed", "redelivered", "dropped", "expired", "malformed", "dead")
"""What the scripts count of a pool's requests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantStatus:
    """One tenant's share of a pool."""

    tenant: str
    backlog_tokens: int
    """Of all entries admitted and not yet answered, leased ones included."""
    backlog_entries: int
    leased_entries: int
    """Of these, how many a replica holds (or held, until their lease runs out)."""
    oldest_age_s: float
    """0 when nothing waits."""
    dead_letters: int
    weight: float
    cap_tokens: int | None
    """None: no cap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaStatus:
    """One live replica; empty where its announcement cannot be read."""

    replica_id: str
    age_s: float
    """Since its last sign of life."""
    fingerprint: str = ""
    model: str = ""
    engine: str = ""
    version: str = ""
    leased_entries: int = 0
    """Requests it holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStatus:
    """One pool."""

    pool: str
    is_known: bool
    """A replica announced itself once, or somebody asked; False is a name that nobody ever used."""
    backlog_tokens: int
    backlog_entries: int
    leased_entries: int
    oldest_age_s: float
    dead_letters: int
    replicas: tuple[ReplicaStatus, ...]
    totals: dict[str, int]
    """Since the pool began, by `OUTCOMES` and `completed_tokens`; what never happened is absent."""
    used_memory_bytes: int
    max_memory_bytes: int
    """0: no limit."""
    tenants: tuple[TenantStatus, ...]


async def read_status(connection: QueueConnection, pool: str) -> PoolStatus:
    """Reads a pool's state; the figures of one tenant belong together, those of two may be a moment apart."""
    keys = PoolKeys(check_pool(pool))
    names = await connection.call(lambda redis: redis.sunion(keys.active, keys.dead_tenants))
    limits = await connection.call(lambda redis: redis.hgetall(keys.limits))
    totals = await connection.call(lambda redis: redis.hgetall(keys.counters))
    memory = await connection.call(lambda redis: redis.info("memory"))
    traces = (keys.info, keys.counters, keys.limits, keys.replicas, keys.active, keys.dead_tenants)
    num_traces = await connection.call(lambda redis: redis.exists(*traces))
    leases: Counter[str] = Counter()
    tenants = tuple([await _read_tenant(connection, keys, name.decode(), limits, leases) for name in sorted(names)])
    return PoolStatus(
        pool=pool,
        is_known=num_traces > 0,
        backlog_tokens=sum(tenant.backlog_tokens for tenant in tenants),
        backlog_entries=sum(tenant.backlog_entries for tenant in tenants),
        leased_entries=sum(tenant.leased_entries for tenant in tenants),
        oldest_age_s=max((tenant.oldest_age_s for tenant in tenants), default=0.0),
        dead_letters=sum(tenant.dead_letters for tenant in tenants),
        replicas=await _replicas(connection, pool, leases),
        totals={name.decode(): int(value) for name, value in sorted(totals.items())},
        used_memory_bytes=int(memory["used_memory"]),
        max_memory_bytes=int(memory["maxmemory"]),
        tenants=tenants,
    )


async def _read_tenant(
    connection: QueueConnection, keys: PoolKeys, tenant: str, limits: dict[bytes, bytes], leases: Counter[str]
) -> TenantStatus:
    """Adds what each replica holds of it to `leases`."""

    async def read(redis: Any) -> list[Any]:
        async with redis.pipeline(transaction=True) as pipe:
            pipe.hgetall(keys.inflight(tenant))
            pipe.xrange(keys.requests(tenant), count=1)
            pipe.time()
            pipe.xlen(keys.dead(tenant))
            pipe.xpending(keys.requests(tenant), GROUP)
            rows: list[Any] = await pipe.execute(raise_on_error=False)
            return rows

    in_flight, oldest, (seconds, micros), num_dead, pending = await connection.call(read)
    cap = limits.get(f"cap:{tenant}".encode(), limits.get(b"cap:*"))
    # Before the first take there is no group, and nothing is leased.
    held = [] if isinstance(pending, Exception) else pending["consumers"]
    leases.update({holder["name"].decode(): int(holder["pending"]) for holder in held})
    admitted_ms = int(oldest[0][0].partition(b"-")[0]) if oldest else None
    return TenantStatus(
        tenant=tenant,
        backlog_tokens=int(in_flight.get(b"tokens", 0)),
        backlog_entries=int(in_flight.get(b"entries", 0)),
        leased_entries=sum(int(holder["pending"]) for holder in held),
        oldest_age_s=0.0 if admitted_ms is None else max(seconds + micros / 1e6 - admitted_ms / 1e3, 0.0),
        dead_letters=int(num_dead),
        weight=float(limits.get(f"weight:{tenant}".encode(), 1.0)),
        cap_tokens=None if cap is None else int(cap),
    )


async def _replicas(connection: QueueConnection, pool: str, leases: Counter[str]) -> tuple[ReplicaStatus, ...]:
    found = await live_replicas(connection, pool)
    return tuple([replace(_replica(replica), leased_entries=leases[replica.replica_id]) for replica in found])


def _replica(replica: LiveReplica) -> ReplicaStatus:
    """What cannot be read, as of another version, is shown as unknown rather than hiding that the replica lives."""
    try:
        info = decode_info(replica.info)
    except OpdError:
        return ReplicaStatus(replica_id=replica.replica_id, age_s=replica.age_s)
    return ReplicaStatus(
        replica_id=replica.replica_id,
        age_s=replica.age_s,
        fingerprint=info.fingerprint,
        model=info.model,
        engine=info.engine,
        version=info.version,
    )
