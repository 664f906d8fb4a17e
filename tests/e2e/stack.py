"""The compose file as a user runs it, and what its containers say of themselves."""

import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.engine import Docker, call

PROJECT = "opde2e"
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true")
POOL_IMAGE, TEACHER_IMAGE, TRAINER_IMAGE = "opd-pool-status", "opd-teacher-server", "opd-trainer"


TESTBED = "/opt/opd/lib/python3.11/site-packages/testbed"
"""Where the trainer's image has it."""


def build_images(docker: Docker, checkout: Path) -> dict[str, int]:
    """Builds what the compose file would, as it would; returns sizes in bytes by image."""
    _lay_wheel(checkout / "deploy/docker/wheels")
    services = yaml.safe_load((checkout / "docker-compose.yml").read_text())["services"]
    sizes = {}
    for name in ("pool", "teacher", "trainer"):
        image, build = services[name]["image"].partition(":-")[2].rstrip("}"), services[name]["build"]
        options = [*docker.build_options, "--file", build["dockerfile"], "--tag", image]
        docker.run("build", *options, build["context"], cwd=checkout, timeout_s=1800)
        sizes[image] = int(docker.run("image", "inspect", "--format", "{{.Size}}", image))
    return sizes


def _lay_wheel(folder: Path) -> None:
    """torch's CPU build, if pip finds it here; the build looks for it by itself otherwise."""
    project = tomllib.loads((folder.parents[2] / "pyproject.toml").read_text())["project"]
    torch = next(line for line in project["optional-dependencies"]["models"] if line.startswith("torch=="))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), f"{torch}+cpu"], capture_output=True, timeout=900)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One compose project."""

    docker: Docker
    folder: Path

    def compose(
        self, *arguments: str, check: bool = True, timeout_s: float = 600.0, variables: Mapping[str, str] | None = None
    ) -> str:
        """`docker-compose ...` in the checkout; standard output."""
        command = [*self.docker.compose_command, "--project-name", PROJECT, *arguments]
        environ = {**self.docker.environ, **(variables or {})}
        return call(command, environ, cwd=self.folder, check=check, timeout_s=timeout_s)

    def containers(self, service: str) -> list[str]:
        """Ids of a service's containers, by number, stopped ones too."""
        labels = [f"label=com.docker.compose.project={PROJECT}", f"label=com.docker.compose.service={service}"]
        filters = [word for label in (*labels, "label=com.docker.compose.oneoff=False") for word in ("--filter", label)]
        found = self.docker.run("ps", "-aq", "--no-trunc", *filters).split()
        number = '{{index .Config.Labels "com.docker.compose.container-number"}}'
        return sorted(found, key=lambda container: int(self.docker.run("inspect", "--format", number, container)))

    def state(self, container: str) -> dict[str, Any]:
        """As Docker has it: Status, ExitCode, Health."""
        found: dict[str, Any] = json.loads(self.docker.run("inspect", "--format", "{{json .State}}", container))
        return found

    def is_healthy(self, container: str) -> bool:
        return bool(self.state(container).get("Health", {}).get("Status") == "healthy")

    def finish(self, container: str, timeout_s: float) -> int:
        """Waits for a container's end; its exit code."""
        return int(self.docker.run("wait", container, timeout_s=timeout_s))

    def log(self, container: str) -> str:
        """Both outputs."""
        done = subprocess.run(
            ["docker", "logs", container], env=dict(self.docker.environ), capture_output=True, text=True, timeout=60
        )
        return done.stdout + done.stderr

    def fetch(self, container: str, url: str, token_file: str = "") -> str:
        """What a URL answers inside a container's network."""
        code = (
            "import sys, urllib.request as u, pathlib; request = u.Request(sys.argv[1]);\n"
            "if len(sys.argv) > 2: request.add_header('authorization', "
            "'Bearer ' + pathlib.Path(sys.argv[2]).read_text().strip())\n"
            "print(u.urlopen(request, timeout=20).read().decode())"
        )
        return self.docker.run("exec", container, "python", "-c", code, url, *filter(None, [token_file]))

    def step(self, trainer: str) -> int:
        """Completed steps of a run with http.port=8081; -1 where it does not answer."""
        try:
            return int(json.loads(self.fetch(trainer, "http://127.0.0.1:8081/v1/run"))["step"])
        except AssertionError:
            return -1

    def pool(self) -> dict[str, Any]:
        """The pool's state as its operator sees it, read with the password of the status process."""
        volume = f"{PROJECT}_access-status:/access:ro"
        redis = "redis://pool@redis:6379/0"
        said = self.docker.run(
            *("run", "--rm", "--network", f"{PROJECT}_default", "--volume", volume, *HARDENED),
            *("--env", "OPD_REDIS_PASSWORD_FILE=/access/pool.password", POOL_IMAGE),
            *("pool", "status", "teacher-post", "--json", "--trust-network", "--redis-url", redis),
        )
        found: dict[str, Any] = json.loads(said)["teachers"]["teacher-post"]
        return found


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Returns when it is so; AssertionError that names it when it does not come true."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"after {timeout_s:g} s it is still not so: {what}"
        time.sleep(0.5)
