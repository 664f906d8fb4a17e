"""Redis access rules: what a tenant's user, and a pool's, may touch.

A tenant has its own keys, the three shared ones it wakes the pool with, and the right to read limits, handshake and
alias. Redis 6.2 knows no read-only key patterns: there these three are guarded by the list of commands alone. Scripts
run with the rights of their caller, and a tenant may send scripts of its own, so admission binds only tenants that
play by the rules; what a tenant gets of the pool is decided in `take`, with rights that no tenant has.
"""

import hashlib

from opd.errors import InvalidRequestError
from opd.queue.keys import SHARED_NAMES, TENANT_NAMES, PoolKeys, alias_key, check_pool, check_tenant

_CONNECTION = "+ping +info +hello +client|setname +select +time"
_SCRIPTS = "+eval +evalsha"
_TENANT_WRITES = "+set +del +pexpire +xadd +xdel +hset +hdel +hincrby +sadd +lpush"
_TENANT_READS = "+get +strlen +exists +xread +xrange +xlen +hget +hmget +llen"
_PER_INCARNATION = frozenset({"alive", "body", "replies", "reply"})
_OPERATOR_ONLY = frozenset({"dead"})


def tenant_rules(tenant: str, pool: str, password: str, *, version: tuple[int, int]) -> list[str]:
    """The rules of `ACL SETUSER <tenant>` for one pool; `version` is the server's major and minor.

    The password is stored as its hash; give at least 16 characters.
    """
    keys = PoolKeys(check_pool(pool))
    check_tenant(tenant)
    own = [f"~{keys.prefix}{name}:{tenant}" for name in sorted(TENANT_NAMES - _PER_INCARNATION - _OPERATOR_ONLY)]
    own += [f"~{keys.prefix}{name}:{tenant}:*" for name in sorted(_PER_INCARNATION)]
    shared = [f"~{keys.prefix}{name}" for name in sorted(SHARED_NAMES)]
    read_only = "%R~" if version >= (7, 0) else "~"
    readable = [f"{read_only}{key}" for key in (keys.limits, keys.info, alias_key(pool.partition("@")[0]))]
    commands = f"{_CONNECTION} {_SCRIPTS} {_TENANT_WRITES} {_TENANT_READS}".split()
    return ["reset", "on", _hashed(tenant, password), *own, *shared, *readable, *commands]


def pool_rules(name: str, pool: str, password: str) -> list[str]:
    """The rules of `ACL SETUSER <name>` for a pool's replicas and its status service: all of the pool, nothing else."""
    keys = PoolKeys(check_pool(pool))
    patterns = [f"~{keys.prefix}*", f"~{alias_key(pool.partition('@')[0])}"]
    commands = ["+@all", "-@admin", "-@dangerous", "+info"]
    return ["reset", "on", _hashed(name, password), *patterns, *commands]


def acl_file_line(name: str, rules: list[str]) -> str:
    """The same as a line of an ACL file, for a Redis whose users are managed elsewhere."""
    return " ".join(["user", name, *rules])


def _hashed(name: str, password: str) -> str:
    if len(password) < 16:
        raise InvalidRequestError(f"password of {name}: has {len(password)} characters; give 16 or more")
    return "#" + hashlib.sha256(password.encode()).hexdigest()
