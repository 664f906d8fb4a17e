"""Who is let into Redis: passwords in URLs, and whether anybody at all comes in without one."""

from pathlib import Path
from urllib.parse import unquote

from opd.errors import OpdError
from opd.paths import PATH_FAULTS
from opd.queue.connection import split_url
from opd.queue.examination import answers_anybody
from services.doctor.findings import Finding, fail, ok, skipped, warn
from services.doctor.plan import Plan

_CLOSE = "opd tenants acl --apply --close-default as another user, with every pool named by --teacher"


async def check_entrance(plan: Plan) -> list[Finding]:
    """Of a Redis that answers us."""
    parts = split_url(plan.redis_url or "")
    found = [await _check_default_user(plan)]
    if parts.password:
        found.append(warn("redis password", "stands in the URL, which other users may see in the list of processes",
                          "give it by OPD_REDIS_URL_FILE or OPD_REDIS_PASSWORD_FILE"))  # fmt: skip
    return found


async def _check_default_user(plan: Plan) -> Finding:
    """Whoever is Redis's user `default` may do everything in every pool, whatever rights tenants have."""
    check, url = "redis default user", plan.redis_url or ""
    way = plan.credentials if plan.tenant else plan.redis_credentials
    try:
        is_open = await answers_anybody(url, way, patience_s=plan.patience_s)
    except OpdError as error:
        return skipped(check, error.message)
    if not is_open:
        return ok(check, "nobody is let in without a password")
    if plan.tenants_file is not None or plan.tenant:
        return fail(check, "PING is answered without user and password: whoever reaches it is that user, not a "
                    "tenant", _CLOSE)  # fmt: skip
    if _is_private_socket(url):
        return ok(check, "needs no password, over a socket that is for its owner alone")
    return warn(check, "PING is answered without user and password: whoever reaches it is that user",
                f"{_CLOSE}; or give it a password, or keep the way to it private")  # fmt: skip


def _is_private_socket(url: str) -> bool:
    parts = split_url(url)
    if parts.scheme != "unix":
        return False
    try:
        # Who may write to a socket may connect to it.
        return not Path(unquote(parts.path)).stat().st_mode & 0o022
    except PATH_FAULTS:
        return False
