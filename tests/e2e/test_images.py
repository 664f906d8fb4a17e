"""What is in the images, and how a container of each starts and ends."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.engine import Docker
from tests.e2e.stack import HARDENED, POOL_IMAGE, TEACHER_IMAGE, TESTBED, TRAINER_IMAGE, Stack, until

pytestmark = pytest.mark.timeout(3600)
IMAGES = (POOL_IMAGE, TEACHER_IMAGE, TRAINER_IMAGE)
Start = Callable[..., str]


@pytest.fixture
def start(docker: Docker) -> Iterator[Start]:
    """`start(image, "teacher", "serve", options=[...])`: a container with nothing to write to but /tmp."""
    started: list[str] = []

    def run(image: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        started.append(docker.run("run", "--detach", *HARDENED, *options, image, *arguments).strip())
        return started[-1]

    yield run
    docker.run("rm", "--force", "--volumes", *started)


def _exit_of(docker: Docker, image: str, *arguments: str) -> tuple[int, str]:
    command = ["docker", "run", "--rm", *HARDENED, image, *arguments]
    done = subprocess.run(command, env=dict(docker.environ), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize("image", IMAGES)
def test_nobody_is_root_and_no_installer_is_left(docker: Docker, image: str) -> None:
    configuration = json.loads(docker.run("image", "inspect", "--format", "{{json .Config}}", image))
    assert configuration["User"] == "10001:10001"
    assert configuration["Entrypoint"] == ["opd"]
    assert configuration["Healthcheck"]["Test"][0] == "CMD"
    listing = "ls /opt/opd/bin; ls /opt/opd/lib/*/site-packages"
    names = set(docker.run("run", "--rm", "--entrypoint", "sh", image, "-c", listing).split())
    assert {"opd", "services", "redis"} <= names
    assert not names & {"pip", "uv", "wheel"}
    assert ("torch" in names) == (image != POOL_IMAGE)
    assert ("testbed" in names) == (image == TRAINER_IMAGE)


def test_a_teacher_is_healthy_on_a_read_only_root_and_sigterm_drains_it(docker: Docker, start: Start) -> None:
    stack = Stack(docker=docker, folder=Path())
    # As it starts by itself, with traces on: what sends them is in the image too.
    served = ("model=/models/teacher-post", "http.port=8080", "grpc.port=50051", "tracing.enabled=true")
    teacher = start(TEACHER_IMAGE, "teacher", "serve", *served, options=("--env", "PYTHONPROFILEIMPORTTIME=1"))
    until(lambda: stack.is_healthy(teacher), 120, "the teacher is healthy")
    # The process itself is number 1, so that Docker's signals reach it and nothing in between.
    arguments = docker.run("exec", teacher, "cat", "/proc/1/cmdline").split("\0")
    assert arguments[1:4] == ["/opt/opd/bin/opd", "teacher", "serve"]
    said = stack.log(teacher)
    docker.run("stop", "--time", "30", teacher)
    assert stack.state(teacher)["ExitCode"] == 0
    assert "clean end after SIGTERM" in stack.log(teacher)
    # Nothing is installed that this process, which served, neither imported nor needs by what it imported.
    script = Path(__file__).with_name("unused_distributions.py").read_text()
    command = ("run", "--rm", "--interactive", "--entrypoint", "python", TEACHER_IMAGE, "-c", script)
    assert "services.teacher_server.engines.transformers_engine" in said
    assert json.loads(docker.run(*command, stdin=said)) == []


def test_a_trainer_is_healthy_and_saves_on_sigterm(docker: Docker, start: Start, tmp_path: Path) -> None:
    stack = Stack(docker=docker, folder=Path())
    # Trained on verified answers alone: no teacher, no queue.
    trainer = start(
        *(TRAINER_IMAGE, "train", f"student.model={TESTBED}/models/student-base", "run_dir=/runs/grpo", "steps=1000"),
        *(f"data.files=['{TESTBED}/data/train.jsonl']", "objective.kind=grpo", "http.port=8081"),
        # Nobody listens there: spans are lost and nothing else is.
        "tracing.enabled=true",
        *("rollout.prompts_per_step=2", "rollout.max_prompt_tokens=256", "rollout.max_response_tokens=64"),
        options=("--volume", "/runs"),
    )

    def has_stepped() -> bool:
        assert stack.state(trainer)["Running"], stack.log(trainer)
        return stack.is_healthy(trainer) and stack.step(trainer) >= 1

    until(has_stepped, 300, "the trainer is healthy and has done a step")
    docker.run("stop", "--time", "60", trainer)
    assert stack.state(trainer)["ExitCode"] == 143, stack.log(trainer)
    docker.run("cp", f"{trainer}:/runs/grpo/checkpoints", str(tmp_path))
    assert list(tmp_path.glob("checkpoints/step-*/model.safetensors"))


def test_a_pool_status_process_waits_for_redis_and_ends_on_sigterm(docker: Docker, start: Start) -> None:
    stack = Stack(docker=docker, folder=Path())
    pool = start(POOL_IMAGE, "pool", "serve", "teachers=['teacher']", "redis_url=redis://127.0.0.1:1/0")
    until(lambda: "http://127.0.0.1:8090" in stack.log(pool), 60, "the pool status process listens")
    docker.run("stop", "--time", "20", pool)
    assert stack.state(pool)["ExitCode"] == 0


@pytest.mark.parametrize(
    ("image", "arguments", "part"),
    [
        (TEACHER_IMAGE, ["train", "student.model=/models/teacher-post"], "services.trainer"),
        (TEACHER_IMAGE, ["demo"], "testbed"),
        (POOL_IMAGE, ["teacher", "serve", "model=/tmp"], "opd: model=/tmp"),
    ],
)
def test_what_an_image_lacks_is_said_in_one_line(docker: Docker, image: str, arguments: list[str], part: str) -> None:
    code, said = _exit_of(docker, image, *arguments)
    assert code == 2
    assert part in said
    assert said.count("\n") == 1, said
