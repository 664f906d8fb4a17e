"""What can be told of a Redis and of this user's rights in it without changing anything that matters.

Rights are tried rather than read: a user may not read the rules it lives under, and Redis 6.2 cannot be asked what it
would refuse. Every trial reads, or writes to a key of its own that is gone within a second.
"""

import secrets
from dataclasses import dataclass, replace
from typing import Any

from opd.credentials import Credentials
from opd.errors import InternalError, PermissionDeniedError, UnauthenticatedError
from opd.queue.access import who_am_i
from opd.queue.connection import QueueConnection, info_field, without_identity
from opd.queue.keys import GROUP, PoolKeys, alias_key

_Command = tuple[str, ...]
_GONE_MS = "1000"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerFacts:
    """A Redis as it describes itself."""

    version: str
    policy: str
    """maxmemory-policy"""
    used_memory_bytes: int
    max_memory_bytes: int
    """0: no limit."""
    has_append_only_file: bool
    writes_fail: bool
    """The last write of its append-only file or snapshot failed, so that it may refuse commands."""
    user: str
    """Whom this connection is; empty where that may not be asked."""


async def read_server(connection: QueueConnection) -> ServerFacts:
    """Asks once and judges nothing; raises as `QueueConnection.call` and `info_field` do."""
    info: dict[str, Any] = await connection.call(lambda redis: redis.info())
    label = connection.label
    return ServerFacts(
        version=info_field(info, "redis_version", label),
        policy=info_field(info, "maxmemory_policy", label),
        used_memory_bytes=int(info_field(info, "used_memory", label)),
        max_memory_bytes=int(info_field(info, "maxmemory", label)),
        has_append_only_file=bool(info.get("aof_enabled")),
        writes_fail="err" in (info.get("aof_last_write_status"), info.get("rdb_last_bgsave_status")),
        user=await _user(connection),
    )


async def _user(connection: QueueConnection) -> str:
    try:
        return await who_am_i(connection)
    except PermissionDeniedError:
        return ""


async def answers_anybody(url: str, way: Credentials, *, patience_s: float) -> bool:
    """Whether PING is answered to somebody without user and password; raises as `QueueConnection.call` does.

    Of `way` the certificates are used. A default user that may not PING counts as closed.
    """
    nobody = replace(way, token=None, user="")
    connection = QueueConnection(without_identity(url), patience_s=patience_s, credentials=nobody)
    try:
        await connection.call(lambda redis: redis.ping())
    except (UnauthenticatedError, PermissionDeniedError):
        return False
    finally:
        await connection.close()
    return True


async def missing_tenant_rights(connection: QueueConnection, pool: str, tenant: str) -> list[str]:
    """What this user is refused of what a tenant's client does, as `COMMAND key`."""
    keys, own = PoolKeys(pool), f"doctor-{secrets.token_hex(4)}"
    alive, body = keys.alive(tenant, own), keys.body(tenant, own, "trial")
    requests, entry, in_flight = keys.requests(tenant), keys.entry(tenant), keys.inflight(tenant)
    trials: list[_Command] = [
        ("EVAL", "return 1", "1", requests),
        ("GET", alias_key(pool.partition("@")[0])),
        ("GET", keys.info),
        ("HMGET", keys.limits, "cap:*"),
        *[("EXISTS", keys.active), ("LLEN", keys.wake), ("LLEN", keys.newcomers)],
        *[("XRANGE", requests, "-", "+", "COUNT", "1"), ("XLEN", requests), ("XDEL", requests, "0-1")],
        *[("HGET", entry, "-"), ("HDEL", entry, "-"), ("HGET", in_flight, "tokens"), ("HDEL", in_flight, "-")],
        *[("STRLEN", keys.reply(tenant, own, "trial")), ("DEL", keys.reply(tenant, own, "trial"))],
        ("XREAD", "COUNT", "1", "STREAMS", keys.replies(tenant, own), "0-0"),
        *[("SET", alive, "1", "PX", _GONE_MS), ("PEXPIRE", alive, _GONE_MS), ("DEL", alive)],
        # Commands that no shared key may be tried with; each finds no key of another type.
        *_on_own_key(body, ("XADD", body, "*", "r", "trial"), ("HSET", body, "r", "trial")),
        *_on_own_key(body, ("HINCRBY", body, "r", "1"), ("SADD", body, "trial"), ("LPUSH", body, "trial")),
    ]
    return await _refused(connection, trials)


async def missing_pool_rights(connection: QueueConnection, pool: str) -> list[str]:
    """What this user is refused of what a replica and the pool status process do, as `COMMAND key`."""
    keys, own = PoolKeys(pool), f"doctor-{secrets.token_hex(4)}"
    requests, replica = keys.requests(own), keys.replica(own)
    trials: list[_Command] = [
        ("EVAL", "return 1", "1", keys.active),
        ("GET", alias_key(pool.partition("@")[0])),
        *[("GET", keys.info), ("HGETALL", keys.limits), ("HGETALL", keys.counters), ("SMEMBERS", keys.replicas)],
        *[("SUNION", keys.active, keys.dead_tenants), ("LLEN", keys.wake), ("LLEN", keys.newcomers)],
        *[("HDEL", keys.deficits, "-"), ("HDEL", keys.ring, "-"), ("SREM", keys.replicas, own)],
        *[("XPENDING", requests, GROUP), ("XACK", requests, GROUP, "0-1"), ("XDEL", requests, "0-1")],
        *[("SET", replica, "", "PX", _GONE_MS), ("PTTL", replica), ("DEL", replica)],
    ]
    return await _refused(connection, trials)


def _on_own_key(key: str, *commands: _Command) -> list[_Command]:
    """Each command by itself, its key with a short life and then gone."""
    return [part for command in commands for part in (command, ("PEXPIRE", key, _GONE_MS), ("DEL", key))]


async def _refused(connection: QueueConnection, trials: list[_Command]) -> list[str]:
    refused = []
    for trial in trials:
        try:
            await connection.call(lambda redis, trial=trial: redis.execute_command(*trial))  # type: ignore[misc]
        except PermissionDeniedError:
            key = trial[3] if trial[0] == "EVAL" else next(word for word in trial if word.startswith("opd:"))
            refused.append(f"{trial[0]} {key}")
        except InternalError:
            # Another answer than a refusal of rights: no group yet, or a key that somebody made into another type.
            continue
    return list(dict.fromkeys(refused))
