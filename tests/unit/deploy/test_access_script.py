"""The script that makes tokens, passwords and users for docker-compose.yml, judged by a real Redis 7."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis, exceptions

from opd.queue.embedded import EmbeddedRedis
from services.teacher_server.tenants import load_tenants

ROOT = Path(__file__).parents[3]
FILES = {
    "grafana/admin.password", "operator/operator.password", "prometheus/metrics_token", "redis/users.acl",
    "status/pool.password", "teacher/metrics.token", "teacher/pool.password", "teacher/tenants.toml",
    "tenants/demo/token", "tenants/math/token",
}  # fmt: skip


def run_script(folder: Path, tenants: str) -> "subprocess.CompletedProcess[str]":
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "ACCESS_DIR": str(folder),
        "TENANTS": tenants,
        "POOLS": "teacher-post other",
    }
    command = ["sh", str(ROOT / "deploy/docker/access.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def make_access(folder: Path, tenants: str = "demo math") -> dict[str, str]:
    """Runs it and returns what lies there then."""
    done = run_script(folder, tenants)
    assert done.returncode == 0, done.stderr
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_secrets_are_made_once_and_each_lies_with_its_owner(tmp_path: Path) -> None:
    first = make_access(tmp_path, "demo")
    second = make_access(tmp_path)
    assert set(second) == FILES
    assert second["status/pool.password"] == second["teacher/pool.password"]
    assert second["prometheus/metrics_token"] == second["teacher/metrics.token"]
    secrets = [name for name in FILES if name.partition("/")[2].partition(".")[2] == "password" or "token" in name]
    assert all(len(second[name].strip()) >= 40 for name in secrets)
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"teacher/tenants.toml", "redis/users.acl"}
    assert set(load_tenants(tmp_path / "teacher/tenants.toml").tenants) == {"demo", "math"}
    # No secret stands where hashes will do.
    for name in secrets:
        assert second[name].strip() not in second["redis/users.acl"] + second["teacher/tenants.toml"]


@pytest.mark.parametrize("name", ["operator", "health"])
def test_a_tenant_cannot_take_the_name_of_another_user(tmp_path: Path, name: str) -> None:
    done = run_script(tmp_path, f"demo {name}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and f"TENANTS: {name} is the name of a Redis user" in done.stderr


def test_redis_takes_the_users(tmp_path: Path) -> None:
    server = shutil.which("redis-server")
    if server is None:
        if os.environ.get("CI") == "true":
            pytest.fail("redis-server 7 is missing")
        pytest.skip("redis-server 7 is missing")
    found = make_access(tmp_path / "access")
    with EmbeddedRedis(tmp_path / "redis", server=server) as redis:
        (tmp_path / "redis/users.acl").write_text(found["redis/users.acl"])
        rules = [line.split() for line in found["redis/users.acl"].splitlines()]
        with Redis.from_url(redis.url) as admin:
            # `default` last: it is the one that does this.
            for _, name, *words in sorted(rules, key=lambda rule: rule[1] == "default"):
                admin.execute_command("ACL", "SETUSER", name, *words)
        check_users(redis.url, found)


def check_users(url: str, found: dict[str, str]) -> None:
    def connect(user: str, password: str) -> Redis:
        return Redis.from_url(url, username=user, password=password.strip())

    with Redis.from_url(url) as nobody, pytest.raises(exceptions.AuthenticationError):
        nobody.ping()
    with connect("health", "none") as health:
        assert health.ping()
        with pytest.raises(exceptions.NoPermissionError):
            health.get("x")
    with connect("demo", found["tenants/demo/token"]) as tenant, pytest.raises(exceptions.NoPermissionError):
        tenant.set("anything", "1")
    with connect("pool", found["status/pool.password"]) as pool, pytest.raises(exceptions.NoPermissionError):
        pool.config_get("maxmemory")
    with connect("operator", found["operator/operator.password"]) as operator:
        assert operator.config_get("maxmemory") == {"maxmemory": "0"} or operator.config_get("maxmemory")
        assert operator.acl_whoami() in ("operator", b"operator")
