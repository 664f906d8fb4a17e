"""Disks, secrets in files, and the tenants file."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from opd.errors import OpdError
from opd.paths import PATH_FAULTS, path_fault
from opd.settings import read_secret_file
from services.doctor.findings import Finding, fail, ok, skipped, warn
from services.doctor.plan import Plan

if TYPE_CHECKING:
    from services.teacher_server.tenants import TenantTable

_GIB = 2**30
_MIN_FREE_BYTES = 2**30
_SOON_FULL_BYTES, _SOON_FULL_SHARE = 10 * _GIB, 0.05


def check_files(plan: Plan) -> list[Finding]:
    """Everything that is told by looking at this machine alone."""
    findings = [check_folder(folder) for folder in plan.folders]
    findings += [check_secret(name, path) for name, path in plan.secret_files]
    findings += [
        warn(f"secret {name}", "stands in the environment, where other processes of its user read it",
             f"write it to a file of mode 600 and set {name}_FILE")
        for name in plan.plain_secrets
    ]  # fmt: skip
    return [*findings, *check_tenants_file(plan)]


def check_folder(folder: Path) -> Finding:
    """Room on the disk under a folder that may not exist yet."""
    check = f"disk {folder}"
    mend = "give --folder with one that this user may enter"
    return _guarded(check, "folder", folder, mend, lambda: [_look_at_folder(check, folder)])[0]


def _look_at_folder(check: str, folder: Path) -> Finding:
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return fail(check, f"{place} is a file", "choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        return fail(check, f"{place} cannot be written by this user", "give it the right, or choose another folder")
    usage = shutil.disk_usage(place)
    message = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
    if usage.free < _MIN_FREE_BYTES:
        return fail(check, message, "make room: checkpoints need several times the size of the student")
    if usage.free < min(_SOON_FULL_BYTES, _SOON_FULL_SHARE * usage.total):
        return warn(check, message, "make room soon: checkpoints need several times the size of the student")
    return ok(check, message)


def check_secret(name: str, path: Path) -> Finding:
    """A file that holds a secret: there, readable by us, not empty, and by whom else."""
    check = f"secret {name}"

    def look() -> list[Finding]:
        read_secret_file(name, path)
        return [_judge_mode(check, path)]

    return _guarded(check, name, path, "write the secret into a file that this user may read", look)[0]


def _judge_mode(check: str, path: Path) -> Finding:
    mode = stat.S_IMODE(path.expanduser().stat().st_mode)
    if mode & 0o022:
        return fail(check, f"{path}: others may write it (mode {mode:03o})", f"chmod 600 {path}")
    if mode & 0o044:
        return warn(check, f"{path}: others may read it (mode {mode:03o})",
                    f"chmod 600 {path}, unless it is mounted into a container of its own")  # fmt: skip
    return ok(check, f"{path}: mode {mode:03o}")


def check_tenants_file(plan: Plan) -> list[Finding]:
    """Whether teachers can read it, and whether the token at hand is one of the tenant's."""
    path = plan.tenants_file
    if path is None:
        return []
    mend = "correct it or give --tenants-file; running teachers go on with what they knew"
    return _guarded("tenants file", "tenants_file", path, mend, lambda: _look_at_tenants(plan, path))


def _look_at_tenants(plan: Plan, path: Path) -> list[Finding]:
    from services.teacher_server.tenants import load_tenants

    table = load_tenants(path)
    judged = _judge_mode("tenants file", path)
    names = ", ".join(table.tenants) or "nobody"
    found = judged if judged.mend else ok("tenants file", f"{path}: {names}")
    return [found, _judge_token(plan, table)] if plan.tenant else [found]


def _judge_token(plan: Plan, table: "TenantTable") -> Finding:
    check, token = f"token of {plan.tenant}", plan.credentials.token
    if token is None:
        return skipped(check, "no token is given")
    try:
        owner = table.authenticate(f"Bearer {token}")
    except OpdError:
        owner = None
    if owner == plan.tenant:
        return ok(check, "is valid by the tenants file")
    whose = f"is that of {owner}" if owner else "is nobody's by the tenants file"
    return fail(check, whose, f"opd tenants rotate {plan.tenant}, and hand the new token over")


def _guarded(check: str, field: str, path: Path, mend: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """What `look` finds; a path that cannot be looked at, for whatever reason, is the finding itself."""
    try:
        return look()
    except OpdError as error:
        return [fail(check, error.message, mend)]
    except PATH_FAULTS as error:
        return [fail(check, f"{field}={path}: cannot be looked at ({path_fault(error)})", mend)]
