"""Packages come without their services: on folders that stand for a machine, with the real systemctl."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.packages import no_services

POLICY = "usr/sbin/policy-rc.d"
UNIT = "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"


def machine(folder: Path, *, policy: str | None = None) -> Path:
    """With two services, neither enabled."""
    (folder / "usr/sbin").mkdir(parents=True)
    (folder / "etc/systemd/system").mkdir(parents=True)
    for name in ("one", "two"):
        (folder / f"etc/systemd/system/{name}.service").write_text(UNIT)
    if policy is not None:
        (folder / POLICY).write_text(policy)
        (folder / POLICY).chmod(0o751)
    return folder


def answer(root: Path) -> int:
    return subprocess.run([root / POLICY, "docker", "start"], timeout=10).returncode


def enable(root: Path, unit: str) -> None:
    """As a package's script would."""
    subprocess.run(["systemctl", f"--root={root}", "enable", unit], check=True, capture_output=True, timeout=30)


def enabled(root: Path) -> set[str]:
    return {link.name for link in (root / "etc/systemd/system").glob("*.wants/*")}


def test_no_service_may_start_and_nothing_of_that_is_left(tmp_path: Path) -> None:
    root = machine(tmp_path)
    with no_services(root, ()):
        assert answer(root) == 101
    assert list((root / "usr/sbin").iterdir()) == []


def test_the_machines_own_policy_comes_back_whatever_happens(tmp_path: Path) -> None:
    own = "#!/bin/sh\nexit 0\n"
    root = machine(tmp_path, policy=own)
    with pytest.raises(RuntimeError, match="apt"), no_services(root, ()):
        assert answer(root) == 101
        raise RuntimeError("apt")
    assert (root / POLICY).read_text() == own and (root / POLICY).stat().st_mode & 0o777 == 0o751
    assert len(list((root / "usr/sbin").iterdir())) == 1


@pytest.mark.parametrize("own", [None, "#!/bin/sh\nexit 104\n"])
def test_what_a_killed_run_left_is_put_right(tmp_path: Path, own: str | None) -> None:
    root = machine(tmp_path / "machine", policy=own)
    with no_services(root, ()):
        shutil.copytree(root, tmp_path / "as it was")
    left = tmp_path / "as it was"
    assert answer(left) == 101
    with no_services(left, ()):
        assert answer(left) == 101
    assert [path.read_text() for path in (left / "usr/sbin").iterdir()] == ([own] if own else [])


@pytest.mark.skipif(shutil.which("systemctl") is None, reason="systemd is not installed")
def test_units_are_enabled_that_were_so_before_and_no_others(tmp_path: Path) -> None:
    root = machine(tmp_path)
    enable(root, "one.service")
    with no_services(root, ("one.service", "two.service", "none.service")):
        enable(root, "two.service")
        assert enabled(root) == {"one.service", "two.service"}
    assert enabled(root) == {"one.service"}
