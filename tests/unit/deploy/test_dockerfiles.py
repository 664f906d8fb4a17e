"""Dockerfiles and shell scripts by their linters, and what the three images must have in common."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "deploy/docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
SCRIPTS = sorted([*ROOT.glob("deploy/**/*.sh"), *ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"])


def tool(name: str) -> str:
    """A linter that a Python package carries."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found, f"{name} is missing: make setup"
    return found


def said_by(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    assert said_by(tool("hadolint"), "--no-color", dockerfile) == ""


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian\nRUN cd /tmp && apt-get install curl\n")
    assert "DL3006" in said_by(tool("hadolint"), "--no-color", bad)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    assert said_by(tool("shellcheck"), script) == ""


def test_shellcheck_looks_at_every_script_and_would_say_something(tmp_path: Path) -> None:
    assert {"secrets.sh", "access.sh", "install.sh", "setup_kubernetes.sh", "run"} <= {path.name for path in SCRIPTS}
    bad = tmp_path / "bad.sh"
    bad.write_text("#!/bin/sh\nrm -rf $1/*\n")
    assert "SC2086" in said_by(tool("shellcheck"), bad)


def test_there_are_three_images_and_they_share_what_they_can() -> None:
    assert [path.suffix for path in DOCKERFILES] == [".pool-status", ".teacher-server", ".trainer"]
    pool, teacher, trainer = (_instructions(path) for path in DOCKERFILES)
    up_to_http = pool[: pool.index("RUN sh install.sh core http") + 1]
    up_to_models = teacher[: teacher.index("RUN sh install.sh models tracing") + 1]
    assert teacher[: len(up_to_http)] == up_to_http
    assert trainer[: len(up_to_models)] == up_to_models


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix)
def test_an_image_starts_our_process_as_nobody(dockerfile: Path) -> None:
    text, lines = dockerfile.read_text(), _instructions(dockerfile)
    assert "# syntax=" not in text
    assert [line for line in lines if line.startswith("FROM")] == [
        "FROM python:3.11-slim AS build",
        "FROM python:3.11-slim",
    ]
    # A number, so that a cluster can tell that it is not root's.
    assert "USER 10001:10001" in lines
    assert 'ENTRYPOINT ["opd"]' in lines
    assert [line for line in lines if re.match(r"HEALTHCHECK .* CMD \[", line)]
    assert lines.index("USER 10001:10001") > max(n for n, line in enumerate(lines) if line.startswith("COPY"))


def test_versions_stand_where_others_have_them() -> None:
    declared = re.findall(r"^ARG VLLM_VERSION=(.+)$", (DOCKER / "Dockerfile.teacher-server").read_text(), re.MULTILINE)
    setup = re.search(r"^VERSION=(.+)$", (ROOT / "scripts/setup_vllm.sh").read_text(), re.MULTILINE)
    assert setup is not None
    assert declared == [setup[1]]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"^RUN sh install\.sh (.+)$", "\n".join(path.read_text() for path in DOCKERFILES), re.MULTILINE)
    groups = {group for line in asked if not line.startswith("code ") for group in line.split()} - {"core"}
    assert groups <= set(extras)


def test_images_of_services_that_trace_have_what_sends_the_spans() -> None:
    for path in DOCKERFILES:
        installed = re.findall(r"^RUN sh install\.sh models (.+)$", path.read_text(), re.MULTILINE)
        # Bytecode too: it is imported only where traces are on, and nothing can be written then.
        (compiled,) = re.findall(r"^RUN sh install\.sh code (.+)$", "\n".join(_instructions(path)), re.MULTILINE)
        is_traced = path.suffix != ".pool-status"
        assert (installed == ["tracing"]) == is_traced == ("opentelemetry.sdk.trace.export" in compiled.split())


def test_the_trainers_image_can_train_adapters() -> None:
    (compiled,) = [line for line in _instructions(DOCKER / "Dockerfile.trainer") if " code " in line]
    assert "RUN sh install.sh train lora" in (DOCKER / "Dockerfile.trainer").read_text() and "peft" in compiled.split()


def test_an_image_holds_code_models_and_nothing_else_of_the_checkout() -> None:
    allowed = {line.lstrip("!") for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", "\n".join(path.read_text() for path in DOCKERFILES), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert all(any(source == name or source.startswith(f"{name}/") for name in allowed) for source in sources)
    assert all(list(ROOT.glob(source)) for source in sources)


def _instructions(dockerfile: Path) -> list[str]:
    """One line each, comments left out."""
    text = "".join(line for line in dockerfile.read_text().splitlines(keepends=True) if not line.startswith("#"))
    return [re.sub(r"\s+", " ", line) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_folder_of_gpu_locks_is_the_services_own() -> None:
    """A named volume takes over the owner of the folder it is put on; where there is none, nobody may take a GPU."""
    compose = (ROOT / "docker-compose.gpu.yml").read_text(encoding="utf-8")
    assert "OPD_GPU_LOCKS: /gpus" in compose and "- gpus:/gpus" in compose
    assert "install -d -o opd -g opd /gpus" in (DOCKER / "Dockerfile.teacher-server").read_text(encoding="utf-8")
