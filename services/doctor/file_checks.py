"""Disks, secrets in files, and the tenants file."""

import os
import shutil
import stat
from pathlib import Path

from opd.errors import OpdError
from opd.settings import read_secret_file
from services.doctor.findings import Finding, fail, ok, skipped, warn
from services.doctor.plan import Plan

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
    try:
        read_secret_file(name, path)
        mode = stat.S_IMODE(path.expanduser().stat().st_mode)
    except OpdError as error:
        return fail(check, error.message, "write the secret into the file it names")
    except OSError as error:
        return fail(check, f"{path}: cannot be looked at ({error.strerror})", "give its folder the right to be entered")
    return _judge_mode(check, path, mode)


def _judge_mode(check: str, path: Path, mode: int) -> Finding:
    if mode & 0o022:
        return fail(check, f"{path}: others may write it (mode {mode:03o})", f"chmod 600 {path}")
    if mode & 0o044:
        return warn(check, f"{path}: others may read it (mode {mode:03o})",
                    f"chmod 600 {path}, unless it is mounted into a container of its own")  # fmt: skip
    return ok(check, f"{path}: mode {mode:03o}")


def check_tenants_file(plan: Plan) -> list[Finding]:
    """Whether teachers can read it, and whether the token at hand is one of the tenant's."""
    from services.teacher_server.tenants import load_tenants

    if plan.tenants_file is None:
        return []
    check = "tenants file"
    try:
        table = load_tenants(plan.tenants_file)
        mode = stat.S_IMODE(plan.tenants_file.expanduser().stat().st_mode)
    except OpdError as error:
        return [fail(check, error.message, "correct it; running teachers go on with what they knew")]
    except OSError as error:
        return [fail(check, f"{plan.tenants_file}: cannot be looked at ({error.strerror})", "give the right path")]
    names = ", ".join(table.tenants) or "nobody"
    judged = _judge_mode(check, plan.tenants_file, mode)
    findings = [judged if judged.mend else ok(check, f"{plan.tenants_file}: {names}")]
    if not plan.tenant:
        return findings
    token = plan.credentials.token
    if token is None:
        return [*findings, skipped(f"token of {plan.tenant}", "no token is given")]
    try:
        owner = table.authenticate(f"Bearer {token}")
    except OpdError:
        owner = None
    check = f"token of {plan.tenant}"
    if owner == plan.tenant:
        return [*findings, ok(check, "is valid by the tenants file")]
    whose = f"is that of {owner}" if owner else "is nobody's by the tenants file"
    return [*findings, fail(check, whose, f"opd tenants rotate {plan.tenant}, and hand the new token over")]
