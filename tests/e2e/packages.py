"""Debian packages of an engine, installed without their services: nothing starts by it, now or at the next boot."""

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("docker.io", "docker-compose", "mmdebstrap", "iptables", "iproute2", "util-linux")
UNITS = ("docker.service", "docker.socket", "containerd.service")
_MARK = "# Of tests/e2e: nothing is to start while packages are installed."
_REFUSAL = f"#!/bin/sh\n{_MARK}\nexit 101\n"


def install(root: Path = Path("/")) -> None:
    """The packages, by apt-get."""
    quiet = {"stdout": subprocess.DEVNULL, "check": True}
    subprocess.run(["apt-get", "update", "-qq"], timeout=300, **quiet)  # type: ignore[call-overload]
    with no_services(root):
        subprocess.run(  # type: ignore[call-overload]
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], timeout=600, **quiet
        )


@contextmanager
def no_services(root: Path, units: Sequence[str] = UNITS) -> Iterator[None]:
    """While it lasts no package starts a service; at its end units are enabled that were so before, and no others."""
    were_enabled = {unit for unit in units if _is_enabled(root, unit)}
    try:
        with _policy(root / "usr/sbin/policy-rc.d"):
            yield
    finally:
        for unit in units:
            if unit not in were_enabled and _is_enabled(root, unit):
                _systemctl(root, "disable", unit)


@contextmanager
def _policy(path: Path) -> Iterator[None]:
    """Debian asks this file before it starts a service. What stood there comes back, but for what a killed run left."""
    aside = path.with_name(f"{path.name}.before-e2e")
    if aside.exists():
        # A run was killed between both renames below; this is the machine's own.
        aside.replace(path)
    is_there = path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")
    if is_there:
        path.replace(aside)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_REFUSAL)
    path.chmod(0o755)
    try:
        yield
    finally:
        if is_there:
            aside.replace(path)
        else:
            path.unlink(missing_ok=True)


def _is_enabled(root: Path, unit: str) -> bool:
    return _systemctl(root, "is-enabled", unit) == "enabled"


def _systemctl(root: Path, *arguments: str) -> str:
    """Of the files below `root`, whether or not systemd runs here; empty where there is none."""
    if shutil.which("systemctl") is None:
        return ""
    command = ["systemctl", f"--root={root}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
