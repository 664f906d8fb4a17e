"""Whether Redis knows the tenants of the file, each with its present token and every pool."""

from opd.errors import OpdError, PermissionDeniedError
from opd.queue.access import tenants_without_access
from opd.queue.connection import QueueConnection
from opd.queue.pools import resolve_pool
from services.doctor.findings import Finding, fail, ok, skipped
from services.doctor.plan import Plan


async def check_tenant_users(plan: Plan, connection: QueueConnection) -> list[Finding]:
    """Empty where there is nothing to compare: no tenants file, no pool, or a tenant's own point of view.

    Rights are of pools, so a teacher's name counts as the pool that is promoted under it.
    """
    from services.teacher_server.tenants import load_tenants

    if plan.tenants_file is None or not plan.teachers or plan.tenant:
        return []
    check = "redis users of tenants"
    try:
        wanted = {name: tenant.token_sha256 for name, tenant in load_tenants(plan.tenants_file).tenants.items()}
    except OpdError:
        # Told by the check of the file itself.
        return []
    try:
        pools = list(dict.fromkeys([await resolve_pool(connection, teacher) for teacher in plan.teachers]))
        missing = await tenants_without_access(connection, wanted, pools)
    except PermissionDeniedError as error:
        return [skipped(check, f"this user may not ask: {error.message}")]
    if not missing:
        return [ok(check, f"{len(wanted)} users with their tokens and {', '.join(pools)}")]
    named = " ".join(f"--teacher {pool}" for pool in pools)
    return [
        fail(check, f"not as the file says for {', '.join(pools)}: {', '.join(missing)}",
             f"opd tenants acl --apply {named}, with every other pool that they ask")
    ]  # fmt: skip
