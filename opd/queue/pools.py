"""What a pool keeps beside its requests: handshake, limits, live replicas, and the alias that names it.

A pool is `name` or `name@fingerprint`. An alias leads from the bare name to the pool that serves it now, so that a new
fingerprint is brought up beside the old one and switched to in one write.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd.errors import InvalidRequestError, TeacherUnavailableError
from opd.queue.connection import QueueConnection
from opd.queue.keys import PoolKeys, alias_key, check_pool, check_tenant


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveReplica:
    """One replica whose sign of life has not expired."""

    replica_id: str
    age_s: float
    """Since its last sign of life."""
    info: bytes
    """The handshake as it announced it."""


async def resolve_pool(connection: QueueConnection, name: str) -> str:
    """The pool behind a teacher's name; a name without alias is a pool itself."""
    pool = await connection.call(lambda redis: redis.get(alias_key(name)))
    return check_pool(pool.decode()) if pool else check_pool(name)


async def promote_pool(connection: QueueConnection, name: str, pool: str, *, is_forced: bool = False) -> str | None:
    """Lets `name` lead to `pool` from now on and returns where it led before.

    TeacherUnavailableError when no replica of that pool ever announced itself or, unless forced, when none lives.
    """
    if "@" in name:
        raise InvalidRequestError(f"name={name}: is a pool, not a teacher's name; leave out what stands from the @ on")
    if check_pool(pool).partition("@")[0] != name:
        # Replicas refuse requests that name another teacher, so such a move would fail every rollout.
        raise InvalidRequestError(f"pool={pool}: is of another teacher than {name}; give {name}@FINGERPRINT")
    await read_info(connection, pool)
    if not is_forced and not await live_replicas(connection, pool):
        raise TeacherUnavailableError(
            f"pool={pool}: has no live replica, so trainers would wait; start one, or promote it with --force"
        )
    before = await connection.call(lambda redis: redis.set(alias_key(name), pool, get=True))
    return before.decode() if before else None


async def publish_info(connection: QueueConnection, pool: str, info: bytes) -> None:
    """Keeps the pool's handshake, so that a trainer can start while no replica runs."""
    await connection.call(lambda redis: redis.set(PoolKeys(pool).info, info))


async def read_info(connection: QueueConnection, pool: str) -> bytes:
    """The pool's handshake as its replicas published it; TeacherUnavailableError while none ever did."""
    info: bytes | None = await connection.call(lambda redis: redis.get(PoolKeys(pool).info))
    if info is None:
        raise TeacherUnavailableError(
            f"teacher={pool}: no replica ever announced itself at {connection.label}; start one or correct the name"
        )
    return info


async def set_limits(
    connection: QueueConnection,
    pool: str,
    *,
    weights: Mapping[str, float],
    caps: Mapping[str, int],
    default_cap: int | None = None,
) -> None:
    """Replaces all limits: share of the pool by weight (1 where absent), tokens in flight by cap."""
    for tenant in (*weights, *caps):
        check_tenant(tenant)
    for tenant, weight in weights.items():
        if not 0.001 <= weight <= 1000:
            raise InvalidRequestError(f"weight of tenant {tenant}={weight}: must lie between 0.001 and 1000")
    limits: dict[str, float | int] = {f"weight:{tenant}": weight for tenant, weight in weights.items()}
    limits |= {f"cap:{tenant}": cap for tenant, cap in caps.items()}
    if default_cap is not None:
        limits["cap:*"] = default_cap
    await connection.call(lambda redis: _replace_hash(redis, PoolKeys(pool).limits, limits))


async def _replace_hash(redis: object, key: str, values: Mapping[str, float | int]) -> None:
    async with redis.pipeline(transaction=True) as pipe:  # type: ignore[attr-defined]
        pipe.delete(key)
        if values:
            pipe.hset(key, mapping=dict(values))
        await pipe.execute()


async def announce_replica(
    connection: QueueConnection, pool: str, replica_id: str, info: bytes, *, expiry_s: float
) -> None:
    """Says that a replica lives; to be repeated well within the expiry."""
    keys = PoolKeys(pool)
    expiry_ms = int(expiry_s * 1000)

    async def write(redis: object) -> None:
        async with redis.pipeline(transaction=True) as pipe:  # type: ignore[attr-defined]
            # The expiry stands before the handshake, so that what is left of it tells the sign's age.
            pipe.set(keys.replica(replica_id), b"%d:%s" % (expiry_ms, info), px=expiry_ms)
            pipe.sadd(keys.replicas, replica_id)
            await pipe.execute()

    await connection.call(write)


async def retract_replica(connection: QueueConnection, pool: str, replica_id: str) -> None:
    """Says that a replica is gone."""
    keys = PoolKeys(pool)

    async def write(redis: object) -> None:
        async with redis.pipeline(transaction=True) as pipe:  # type: ignore[attr-defined]
            pipe.delete(keys.replica(replica_id))
            pipe.srem(keys.replicas, replica_id)
            await pipe.execute()

    await connection.call(write)


async def live_replicas(connection: QueueConnection, pool: str) -> list[LiveReplica]:
    """Replicas by name whose announcement has not expired; the others are struck off the list."""
    keys = PoolKeys(check_pool(pool))
    names = sorted(name.decode() for name in await connection.call(lambda redis: redis.smembers(keys.replicas)))

    async def read(redis: Any) -> list[Any]:
        async with redis.pipeline(transaction=True) as pipe:
            for name in names:
                pipe.get(keys.replica(name))
                pipe.pttl(keys.replica(name))
            rows: list[Any] = await pipe.execute()
            return rows

    rows = await connection.call(read) if names else []
    found = {name: _live(name, *row) for name, row in zip(names, zip(rows[::2], rows[1::2], strict=True), strict=True)}
    gone = [name for name, replica in found.items() if replica is None]
    if gone:
        await connection.call(lambda redis: redis.srem(keys.replicas, *gone))
    return [replica for replica in found.values() if replica is not None]


def _live(name: str, value: bytes | None, left_ms: int) -> LiveReplica | None:
    if value is None:
        return None
    expiry_ms, _, info = value.partition(b":")
    if not expiry_ms.isdigit():
        # Of another version: alive, and more is not known.
        return LiveReplica(replica_id=name, age_s=0.0, info=b"")
    return LiveReplica(replica_id=name, age_s=max(int(expiry_ms) - left_ms, 0) / 1000, info=info)
