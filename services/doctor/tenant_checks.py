"""Whether Redis knows the tenants of the file, each with its present token and every pool."""

from opd.errors import OpdError, PermissionDeniedError
from opd.queue.access import tenants_without_access
from opd.queue.connection import QueueConnection
from services.doctor.findings import Finding, fail, ok, skipped
from services.doctor.plan import Plan


async def check_tenant_users(plan: Plan, connection: QueueConnection) -> list[Finding]:
    """Empty where there is nothing to compare: no tenants file, no pool, or a tenant's own point of view."""
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
        missing = await tenants_without_access(connection, wanted, plan.teachers)
    except PermissionDeniedError:
        return [skipped(check, "this user may not ask for ACL LIST")]
    if not missing:
        return [ok(check, f"{len(wanted)} users with their tokens and pools")]
    return [
        fail(check, f"not as the file says: {', '.join(missing)}",
             "opd tenants acl --apply, with every pool named by --teacher")
    ]  # fmt: skip
