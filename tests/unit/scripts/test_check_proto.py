"""The gate before the schema: what was released goes on to be readable, and nobody passes because a tool is missing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = Path("proto/opd/v1/teacher.proto")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("proto", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def path_with_buf() -> str:
    installed = ROOT / ".buf/node_modules/.bin"
    path = f"{installed}{os.pathsep}{os.environ['PATH']}"
    if shutil.which("buf", path=path) is None:
        if os.environ.get("CI") == "true":
            pytest.fail("buf is missing; scripts/check_proto.sh installs it")
        pytest.skip("buf: not installed yet; run scripts/check_proto.sh")
    return path


def check(checkout: Path, path: str, *args: str, ci: str = "") -> subprocess.CompletedProcess[str]:
    command = ["bash", str(checkout / "scripts/check_proto.sh"), *args]
    env = {**os.environ, "PATH": path, "CI": ci}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def edit(checkout: Path, old: str, new: str) -> None:
    schema = (checkout / SCHEMA).read_text()
    assert old in schema
    (checkout / SCHEMA).write_text(schema.replace(old, new, 1))


def test_the_schema_as_it_is_passes(checkout: Path, path_with_buf: str) -> None:
    found = check(checkout, path_with_buf)
    assert found.returncode == 0, found.stdout + found.stderr


def test_an_addition_passes(checkout: Path, path_with_buf: str) -> None:
    edit(checkout, "message ScoreResponse {", "message ScoreResponse {\n  string note = 9;")
    assert check(checkout, path_with_buf).returncode == 0


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("string tenant = 4;", "bytes tenant = 4;", 'changed type from "string" to "bytes"'),
        ("  string tenant = 4;", "", '"tenant" on message "ScoreRequest" was deleted'),
        ("DTYPE_BITS = 7;", "DTYPE_BITS = 8;", 'value "7" on enum "DType" was deleted'),
        ("string tenant = 4;", "string tenant = 4;\n  string wantsMore = 99;", "lower_snake_case"),
    ],
)
def test_a_break_or_a_breach_of_style_is_refused_by_name(
    checkout: Path, path_with_buf: str, old: str, new: str, reason: str
) -> None:
    edit(checkout, old, new)
    found = check(checkout, path_with_buf)
    assert found.returncode != 0 and reason in found.stdout


def test_a_release_makes_the_schema_the_released_one(checkout: Path, path_with_buf: str) -> None:
    edit(checkout, "string tenant = 4;", "bytes tenant = 4;")
    assert check(checkout, path_with_buf, "--renew").returncode == 0
    assert check(checkout, path_with_buf).returncode == 0
    assert (checkout / "proto/released/opd/v1/teacher.proto").read_text() == (checkout / SCHEMA).read_text()


def test_without_buf_it_says_so_and_fails_where_it_counts(checkout: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    for name in ("bash", "dirname"):
        (bare / name).symlink_to(shutil.which(name) or "")
    at_home, in_ci = (check(checkout, str(bare), ci=ci) for ci in ("", "true"))
    assert (at_home.returncode, in_ci.returncode) == (0, 1)
    for found in (at_home, in_ci):
        assert "neither buf nor npm on PATH; install one of them" in found.stderr
