"""Redis access rules: what a tenant's user, and a pool's, may touch.

A tenant has its own keys, the three shared ones it wakes the pool with, and the right to read limits, handshake and
alias. Redis 6.2 knows no read-only key patterns: there a tenant can write these three, of the whole pool. Scripts
run with the rights of their caller, and a tenant may send scripts of its own, so admission binds only tenants that
play by the rules; what a tenant gets of the pool is decided in `take`, with rights that no tenant has.
"""

import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from opd.errors import InternalError, InvalidRequestError, PermissionDeniedError
from opd.queue.connection import QueueConnection, info_field
from opd.queue.keys import SHARED_NAMES, TENANT_NAMES, PoolKeys, alias_key, check_pool, check_tenant

_CONNECTION = "+ping +info +hello +client|setname +select +time"
_SCRIPTS = "+eval +evalsha"
_TENANT_WRITES = "+set +del +pexpire +xadd +xdel +hset +hdel +hincrby +sadd +lpush"
_TENANT_READS = "+get +strlen +exists +xread +xrange +xlen +hget +hmget +llen"
_PER_INCARNATION = frozenset({"alive", "body", "replies", "reply"})
_OPERATOR_ONLY = frozenset({"dead"})


def tenant_rules(
    tenant: str, pools: Sequence[str], password_sha256: Sequence[str], *, version: tuple[int, int]
) -> list[str]:
    """The rules of `ACL SETUSER <tenant>` for its pools; `version` is the server's major and minor.

    Passwords are given as their hashes, several while one is being rotated. InvalidRequestError for a name that could
    stand for more than itself in a key pattern.
    """
    check_tenant(tenant)
    keys = [key for pool in pools for key in _tenant_keys(tenant, pool, version)]
    commands = f"{_CONNECTION} {_SCRIPTS} {_TENANT_WRITES} {_TENANT_READS}".split()
    return ["reset", "on", *(f"#{sha256}" for sha256 in password_sha256), *keys, *commands]


def _tenant_keys(tenant: str, pool: str, version: tuple[int, int]) -> list[str]:
    keys = PoolKeys(check_pool(pool))
    own = [f"~{keys.prefix}{name}:{tenant}" for name in sorted(TENANT_NAMES - _PER_INCARNATION - _OPERATOR_ONLY)]
    own += [f"~{keys.prefix}{name}:{tenant}:*" for name in sorted(_PER_INCARNATION)]
    shared = [f"~{keys.prefix}{name}" for name in sorted(SHARED_NAMES)]
    read_only = "%R~" if version >= (7, 0) else "~"
    readable = [f"{read_only}{key}" for key in (keys.limits, keys.info, alias_key(pool.partition("@")[0]))]
    return [*own, *shared, *readable]


def pool_rules(pools: Sequence[str], password_sha256: Sequence[str]) -> list[str]:
    """The rules of `ACL SETUSER` for the replicas and status service of pools: all of these pools, nothing else."""
    patterns = [
        pattern
        for pool in pools
        for pattern in (f"~{PoolKeys(check_pool(pool)).prefix}*", f"~{alias_key(pool.partition('@')[0])}")
    ]
    commands = ["+@all", "-@admin", "-@dangerous", "+info"]
    return ["reset", "on", *(f"#{sha256}" for sha256 in password_sha256), *patterns, *commands]


def acl_file_line(name: str, rules: Sequence[str]) -> str:
    """The same as a line of an ACL file, for a Redis whose users are managed elsewhere."""
    return " ".join(["user", name, *rules])


def hash_password(name: str, password: str) -> str:
    """What Redis keeps of a password; InvalidRequestError for a short one."""
    if len(password) < 16:
        raise InvalidRequestError(f"password of {name}: has {len(password)} characters; give 16 or more")
    return hashlib.sha256(password.encode()).hexdigest()


async def read_version(connection: QueueConnection) -> tuple[int, int]:
    """Major and minor number of the server."""
    server = await connection.call(lambda redis: redis.info("server"))
    major, minor = info_field(server, "redis_version", connection.label).split(".")[:2]
    return int(major), int(minor)


async def who_am_i(connection: QueueConnection) -> str:
    """The user of this connection."""
    name: bytes = await connection.call(_acl("WHOAMI"))
    return name.decode()


async def apply_users(
    connection: QueueConnection, users: Mapping[str, Sequence[str]], pools: Sequence[str]
) -> tuple[list[str], bool]:
    """Sets the users of a running Redis and removes tenants of these pools that are not among them.

    Returns the removed names, and whether Redis wrote its users to its own file; otherwise a restart forgets them.
    """
    for name, rules in users.items():
        await connection.call(_acl("SETUSER", name, *rules))
    lines = await connection.call(_acl("LIST"))
    gone = sorted(_tenants_of(lines, pools) - set(users))
    if gone:
        # Their connections are cut with it.
        await connection.call(_acl("DELUSER", *gone))
    try:
        await connection.call(_acl("SAVE"))
    except InternalError:
        return gone, False
    return gone, True


async def tenants_without_access(
    connection: QueueConnection, wanted: Mapping[str, Sequence[str]], pools: Sequence[str]
) -> list[str]:
    """Which tenants, by name with their tokens' hashes, lack a user with these passwords for each of these pools."""
    lines: list[bytes] = await connection.call(_acl("LIST"))
    users = {name: set(rules) for _, name, *rules in (line.decode().split(" ") for line in lines)}
    needed = {
        name: {
            "on",
            *(f"#{sha256}" for sha256 in hashes),
            *(f"~{PoolKeys(pool).prefix}requests:{name}" for pool in pools),
        }
        for name, hashes in wanted.items()
    }
    return sorted(name for name, rules in needed.items() if not rules <= users.get(name, set()))


async def cut_connections(connection: QueueConnection, user: str) -> bool:
    """Ends the open connections of a user that was turned off; False where we may not."""
    try:
        await connection.call(lambda redis: redis.execute_command("CLIENT", "KILL", "USER", user))
    except PermissionDeniedError:
        return False
    return True


def _acl(*words: str) -> Callable[[Any], Awaitable[Any]]:
    return lambda redis: redis.execute_command("ACL", *words)


def _tenants_of(lines: Iterable[bytes], pools: Sequence[str]) -> set[str]:
    """Users whose own request stream is that of a tenant of these pools: what `tenant_rules` gives and nobody else."""
    found = set()
    for line in lines:
        _, name, *rules = line.decode().split(" ")
        if any(f"~{PoolKeys(pool).prefix}requests:{name}" in rules for pool in pools):
            found.add(name)
    return found
