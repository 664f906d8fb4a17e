"""Redis users rendered from the tenants file, as lines of an ACL file or onto a running Redis.

A tenant's Redis password is its token: Redis and the tenants file keep the same hash, so nothing secret is needed here.
"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from opd.errors import ConfigError
from opd.queue.access import (
    acl_file_line,
    apply_users,
    cut_connections,
    hash_password,
    pool_rules,
    read_version,
    tenant_rules,
    who_am_i,
)
from opd.queue.keys import check_pool
from opd.settings import read_secret_file
from services.teacher_server.queue_access import QueueAccess
from services.teacher_server.tenants import TenantTable, check_name, load_tenants

# Nobody can be it any more. Its rights stay, because Redis 7.0 reads its append-only file back with them: without, it
# drops every transaction in the file, and a restart loses the queue.
_DEFAULT_OFF = ["reset", "~*", "&*", "+@all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessPlan:
    """Which users Redis is to have."""

    table: TenantTable
    pools: tuple[str, ...]
    pool_user: str = ""
    pool_password_sha256: str = ""
    close_default: bool = False

    @classmethod
    def load(
        cls,
        file: Path,
        pools: Sequence[str],
        *,
        pool_user: str = "",
        pool_password_file: Path | None = None,
        close_default: bool = False,
    ) -> Self:
        """Reads file and password; raises ConfigError or InvalidRequestError."""
        table = load_tenants(file)
        for pool in pools:
            check_pool(pool)
        if bool(pool_user) != (pool_password_file is not None):
            raise ConfigError("--pool-user: goes with --pool-password-file; give both or neither")
        sha256 = ""
        if pool_password_file is not None:
            if check_name(pool_user) in table.tenants or pool_user == "default":
                raise ConfigError(f"--pool-user {pool_user}: is a tenant's or Redis's own name; choose another")
            sha256 = hash_password(pool_user, read_secret_file("--pool-password-file", pool_password_file))
        return cls(
            table=table,
            pools=tuple(pools),
            pool_user=pool_user,
            pool_password_sha256=sha256,
            close_default=close_default,
        )

    def users(self, version: tuple[int, int]) -> dict[str, list[str]]:
        """Rules by user, for a server of this version."""
        users = {
            name: tenant_rules(name, self.pools, tenant.token_sha256, version=version)
            for name, tenant in self.table.tenants.items()
        }
        if self.pool_user:
            users[self.pool_user] = pool_rules(self.pools, [self.pool_password_sha256])
        if self.close_default:
            users["default"] = _DEFAULT_OFF
        return users


def render_plan(plan: AccessPlan, redis_version: str) -> str:
    """Lines of an ACL file, with a `default` user only when it is to be closed."""
    numbers = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)?", redis_version)
    if numbers is None:
        raise ConfigError(f"--redis-version {redis_version}: is no version; write 6.2 or 7.0")
    users = plan.users((int(numbers[1]), int(numbers[2])))
    return "\n".join(acl_file_line(name, rules) for name, rules in users.items())


def apply_plan(plan: AccessPlan, access: QueueAccess) -> str:
    """Sets the users of a running Redis and says what was done."""
    return asyncio.run(_apply(plan, access))


async def _apply(plan: AccessPlan, access: QueueAccess) -> str:
    async with access.opened() as connection:
        own_name = await who_am_i(connection)
        if plan.close_default and own_name == "default":
            raise ConfigError("--close-default: would shut out the user that does it; connect as another one")
        users = plan.users(await read_version(connection))
        if own_name in users:
            raise ConfigError(f"{own_name}: is the user that does this; rename the tenant or connect as another one")
        gone, is_saved = await apply_users(connection, users, plan.pools)
        is_cut = not plan.close_default or await cut_connections(connection, "default")
    kept = "saved by Redis" if is_saved else "not in a file of Redis's: run again after its restart, or use an aclfile"
    open_ones = "" if is_cut else "; open connections of the default user stay open: allow CLIENT KILL, run again"
    return f"{connection.label}: {len(users)} users set, removed: {', '.join(gone) or 'none'}; {kept}{open_ones}"
