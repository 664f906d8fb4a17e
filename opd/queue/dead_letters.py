"""Requests that took their replica down several times: list them, look at one, put one back."""

from dataclasses import dataclass

from opd.errors import InvalidRequestError
from opd.queue.connection import QueueConnection
from opd.queue.keys import PoolKeys, check_tenant

_REQUEUED_BODY_TTL_MS = 86_400_000


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """One request that was put aside. Example: `DeadLetter(dead_id="1700000000000-0", tenant="math", ...)`."""

    dead_id: str
    """`<milliseconds>-<n>`: when it was put aside, on Redis's clock."""
    tenant: str
    rollout_id: str
    incarnation: str
    num_tokens: int
    num_deliveries: int
    last_replica: str


async def list_dead(connection: QueueConnection, pool: str, *, max_per_tenant: int = 100) -> list[DeadLetter]:
    """The pool's dead letters by tenant, oldest first."""
    keys = PoolKeys(pool)
    tenants = await connection.call(lambda redis: redis.smembers(keys.dead_tenants))
    letters = []
    for tenant in sorted(name.decode() for name in tenants):
        stream = keys.dead(tenant)
        rows = await connection.call(lambda redis, stream=stream: redis.xrange(stream, count=max_per_tenant))  # type: ignore[misc]
        letters += [_read(tenant, dead_id, fields) for dead_id, fields in rows]
    return letters


async def show_dead(connection: QueueConnection, pool: str, tenant: str, dead_id: str) -> tuple[DeadLetter, bytes]:
    """One dead letter and its request's body."""
    keys = PoolKeys(pool)
    stream = keys.dead(check_tenant(tenant))
    rows = await connection.call(lambda redis: redis.xrange(stream, min=dead_id, max=dead_id))
    if not rows:
        raise _unknown(pool, tenant, dead_id)
    letter = _read(tenant, *rows[0])
    body_key = keys.body(tenant, letter.incarnation, letter.rollout_id)
    body: bytes | None = await connection.call(lambda redis: redis.get(body_key))
    if body is None:
        raise _unknown(pool, tenant, dead_id)
    return letter, body


async def requeue_dead(connection: QueueConnection, pool: str, tenant: str, dead_id: str) -> str:
    """Puts a dead letter back with a fresh delivery count and deadline; returns its new entry id.

    It is scored even when its trainer is gone, and its reply kept until it expires: a way to see whether a
    mended teacher can take it.
    """
    keys = PoolKeys(pool)
    answer = await connection.script(
        "requeue", keys.dead(check_tenant(tenant)), keys.prefix, tenant, dead_id, _REQUEUED_BODY_TTL_MS
    )
    if answer == b"gone":
        raise _unknown(pool, tenant, dead_id)
    if answer == b"queued":
        raise InvalidRequestError(
            f"dead letter {dead_id} of tenant {tenant}: its trainer has submitted it again; wait for its answer"
        )
    return str(answer.decode())


def _read(tenant: str, dead_id: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    return DeadLetter(
        dead_id=dead_id.decode(),
        tenant=tenant,
        rollout_id=fields[b"r"].decode(),
        incarnation=fields[b"i"].decode(),
        num_tokens=int(fields[b"t"]),
        num_deliveries=int(fields[b"n"]),
        last_replica=fields[b"c"].decode(),
    )


def _unknown(pool: str, tenant: str, dead_id: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"dead letter {dead_id} of tenant {tenant} in pool {pool}: not there; list them with `opd pool dead list`"
    )
