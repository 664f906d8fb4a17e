"""A Redis whose users stand in a file and whose default user is off must still find its data after a restart."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, RedisError

from opd.queue.access import acl_file_line, hash_password
from opd.queue.keys import PoolKeys
from services.teacher_server.tenant_access import AccessPlan, render_plan
from services.teacher_server.tenants_file import add_tenant

TOKEN, POOL_PASSWORD = "opd_a-token-that-is-long-enough", "the password of the pool"


@contextmanager
def served(binary: str, folder: Path) -> Iterator[str]:
    """A server on the folder's data and users; it ends as `docker stop` would end it."""
    path = folder / "redis.sock"
    options = [
        "--dir",
        folder,
        "--port",
        0,
        "--unixsocket",
        path,
        "--appendonly",
        "yes",
        "--aclfile",
        folder / "users.acl",
    ]
    with (folder / "redis.log").open("ab") as log:
        server = subprocess.Popen([binary, *map(str, options)], stdout=log, stderr=log)
    try:
        _wait_for(f"unix://{path}", server)
        yield f"unix://{path}"
    finally:
        os.kill(server.pid, signal.SIGTERM)
        server.wait(20)


def _wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    give_up_at = time.monotonic() + 20
    while server.poll() is None and time.monotonic() < give_up_at:
        try:
            with Redis.from_url(url) as nobody:
                nobody.ping()
            pytest.fail("the default user is not off")
        except AuthenticationError:
            return
        except RedisError:
            time.sleep(0.05)
    pytest.fail("the server did not start")


def test_what_was_written_as_a_transaction_is_there_after_a_restart(redis_server_binary: str, tmp_path: Path) -> None:
    # A socket's path has to be short.
    folder = Path("/tmp") / f"opd-acl-{os.getpid()}-{Path(redis_server_binary).parent.name[:8]}"
    folder.mkdir(mode=0o700)
    try:
        _check(redis_server_binary, folder, tmp_path)
    finally:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


def _check(binary: str, folder: Path, secrets: Path) -> None:
    tenants, password = secrets / "tenants.toml", secrets / "pool.password"
    add_tenant(tenants, "math", TOKEN, weight=1.0, max_inflight_tokens=None, hidden_states=False)
    password.write_text(POOL_PASSWORD)
    plan = AccessPlan.load(tenants, ["qwen"], pool_user="pool", pool_password_file=password, close_default=True)
    version = "7.0" if _is_seven(binary) else "6.2"
    operator = acl_file_line("operator", ["reset", "on", f"#{hash_password('operator', POOL_PASSWORD)}", "~*", "+@all"])
    (folder / "users.acl").write_text(f"{render_plan(plan, version)}\n{operator}\n")
    keys = PoolKeys("qwen")
    with served(binary, folder) as url:
        _write(url, keys)
    with served(binary, folder) as url, _connect(url, "pool", POOL_PASSWORD) as pool:
        # Without its rights, Redis 7.0 drops every transaction of the file and says so in its log alone.
        assert pool.hgetall(keys.counters) == {b"completed": b"2", b"delivered": b"2"}
        assert pool.xlen(keys.requests("math")) == 1
        assert "NOPERM" not in (folder / "redis.log").read_text()


def _write(url: str, keys: PoolKeys) -> None:
    with _connect(url, "math", TOKEN) as tenant:
        # The writes of one script go into the append-only file as one transaction.
        script = "redis.call('XADD', KEYS[1], '*', 'i', '1'); redis.call('SADD', KEYS[2], 'math')"
        tenant.eval(script, 2, keys.requests("math"), keys.active)
    with _connect(url, "pool", POOL_PASSWORD) as pool, pool.pipeline(transaction=True) as transaction:
        transaction.hincrby(keys.counters, "completed", 2)
        transaction.hincrby(keys.counters, "delivered", 2)
        transaction.execute()


def _connect(url: str, user: str, password: str) -> Any:
    return Redis.from_url(url, username=user, password=password)


def _is_seven(binary: str) -> bool:
    return "v=7" in subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
