"""A Docker engine for the tests: the one that runs here, or one of our own that leaves nothing behind.

An engine of our own is Debian's, in mount, process and (while containers run) network namespaces of its own. It and all
its containers are processes under one `unshare` that dies with us: whatever happens, nothing runs on. Images are built
in the network of this machine, so that pip reaches its package index; then the engine is started again on the same data
inside a network namespace, where compose's networks touch no rule of this machine.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.packages import install

_BUILDING = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false")
_RUNNING = ("--bip=10.198.0.1/24", "--default-address-pool=base=10.198.16.0/20,size=24")
_START_S = 60.0
_STOP_S = 60.0


class NoEngineError(Exception):
    """There is none, and none can be had here."""


@dataclass(frozen=True, kw_only=True)
class Docker:
    """How to speak to an engine."""

    environ: Mapping[str, str]
    compose_command: tuple[str, ...]
    """`docker compose` or `docker-compose`."""
    build_options: tuple[str, ...] = ()
    """What `docker build` needs here."""
    start_running: Callable[[], None] = lambda: None
    """To be called once everything is built."""
    is_ours: bool = False
    """Its images go with it, or are kept for the next run; another's is to be left as it was found."""

    def run(
        self, *arguments: str, cwd: Path | None = None, check: bool = True, timeout_s: float = 600.0, stdin: str = ""
    ) -> str:
        """`docker ...`; standard output. A failure shows both outputs."""
        return call(["docker", *arguments], self.environ, cwd=cwd, check=check, timeout_s=timeout_s, stdin=stdin)


def call(
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    cwd: Path | None = None,
    check: bool = True,
    timeout_s: float = 600.0,
    stdin: str = "",
) -> str:
    """Runs a command to its end; AssertionError with all that it said where it fails and `check` is set."""
    done = subprocess.run(
        command, env=dict(environ), cwd=cwd, timeout=timeout_s, input=stdin, capture_output=True, text=True
    )
    said = f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0 or not check, said
    return done.stdout


@contextmanager
def docker_engine(folder: Path, *, keeps_data: bool = False) -> Iterator[Docker]:
    """The running engine, or our own in `folder`, which is gone with it; NoEngineError says why there is none.

    With `keeps_data` the folder and the images in it stay, for the next engine there.
    """
    if _answers(os.environ):
        yield Docker(environ=os.environ, compose_command=_compose_command())
        return
    with own_engine(folder, keeps_data=keeps_data) as docker:
        yield docker


@contextmanager
def own_engine(folder: Path, *, keeps_data: bool = False) -> Iterator[Docker]:
    """As `docker_engine`, whatever runs here."""
    _install()
    own = _OwnEngine(folder)
    try:
        own.start(_BUILDING)
        yield Docker(
            environ=own.environ,
            compose_command=_compose_command(),
            build_options=("--network=host",),
            start_running=own.move_into_network,
            is_ours=True,
        )
    finally:
        own.stop()
        if not keeps_data:
            shutil.rmtree(folder, ignore_errors=True)


class _OwnEngine:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The client's own folder too: nobody's log-in or proxy is used.
        client = {"DOCKER_HOST": f"unix://{folder}/docker.sock", "DOCKER_CONFIG": str(folder / "client")}
        self.environ = {**os.environ, **client, "DOCKER_BUILDKIT": "0", "COMPOSE_DOCKER_CLI_BUILD": "0"}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, options: Sequence[str], *namespaces: str) -> None:
        (self._folder / "daemon.json").write_text("{}\n")
        # What an engine that was killed has left; process ids mean nothing in a new namespace.
        (self._folder / "pid").unlink(missing_ok=True)
        shutil.rmtree(self._folder / "exec", ignore_errors=True)
        files = {"data-root": "data", "exec-root": "exec", "pidfile": "pid", "config-file": "daemon.json"}
        engine = [
            "dockerd",
            *(f"--{name}={self._folder / file}" for name, file in files.items()),
            f"--host={self.environ['DOCKER_HOST']}",
            *options,
        ]
        isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *namespaces]
        prepared = ["sh", "-c", 'ip link set lo up; exec "$@"', "sh"] if namespaces else []
        with (self._folder / "engine.log").open("ab") as log:
            # Dies with this process, and its children with it.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *isolated, *prepared, *engine], stdout=log, stderr=log
            )
        give_up_at = time.monotonic() + _START_S
        while not _answers(self.environ):
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self.stop()
                log_tail = (self._folder / "engine.log").read_text(errors="replace")[-2000:]
                raise NoEngineError(f"dockerd does not start here: {log_tail}")
            time.sleep(0.2)

    def move_into_network(self) -> None:
        """The same data, now with networks of its own."""
        process = self._process
        assert process is not None
        # In order, so that the data is sound: the engine is the first process of its namespace.
        for child in _children(process.pid):
            os.kill(child, signal.SIGTERM)
        process.wait(_STOP_S)
        self.start(_RUNNING, "--net")

    def stop(self) -> None:
        """Ends containers, engine and namespaces; the data may be left unsound, it goes next."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None and _answers(self.environ):
            containers = call(["docker", "ps", "-aq"], self.environ, check=False).split()
            if containers:
                call(["docker", "rm", "-f", *containers], self.environ, check=False)
        process.kill()
        process.wait()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _answers(environ: Mapping[str, str]) -> bool:
    if shutil.which("docker") is None:
        return False
    try:
        command = ["docker", "info", "--format", "{{.ServerVersion}}"]
        done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and bool(done.stdout.strip())


def _compose_command() -> tuple[str, ...]:
    for command in (("docker", "compose"), ("docker-compose",)):
        if shutil.which(command[0]) is None:
            continue
        if subprocess.run([*command, "version"], capture_output=True, timeout=20).returncode == 0:
            return command
    raise NoEngineError("there is no docker compose; install docker-compose or the compose plugin")


def _install() -> None:
    if os.geteuid() != 0:
        raise NoEngineError("no Docker engine runs and we are not root, who could start one; start Docker")
    needed = ("dockerd", "docker", "docker-compose", "mmdebstrap", "iptables", "ip", "unshare", "setpriv")
    if all(shutil.which(name) for name in needed):
        return
    if shutil.which("apt-get") is None:
        raise NoEngineError("no Docker engine runs and there is no apt-get to install one; start Docker")
    install()
