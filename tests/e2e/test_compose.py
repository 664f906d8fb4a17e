"""`docker-compose up` as it stands in the README, and then a run through everything that goes wrong with containers."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.check_demo import broken_promises
from tests.e2e.stack import PROJECT, TESTBED, Stack, until

pytestmark = pytest.mark.timeout(3600)
LEASE_S = 3
TRIES = 8
STEPS = 40
ROLLOUTS = 128


GPU_FILES = ("--file", "docker-compose.yml", "--file", "docker-compose.gpu.yml")
GPU_VARIABLES = {
    "TEACHER_MODEL": "/models/teacher", "STUDENT_A_MODEL": "/models/a", "STUDENT_B_MODEL": "/models/b",
    "PROMPTS_A": "a.parquet", "PROMPTS_B": "b.parquet", "TEACHER_GPUS": "2,3",
    "TRAINER_A_GPU": "0", "TRAINER_B_GPU": "1",
}  # fmt: skip


def test_the_client_takes_the_override_for_gpus_and_names_a_missing_variable(stack: Stack) -> None:
    said = yaml.safe_load(stack.compose(*GPU_FILES, "config", variables=GPU_VARIABLES))["services"]
    assert {"access", "redis", "teacher", "trainer", "trainer-b"} <= set(said)
    assert said["teacher"]["image"] == "opd-teacher-server:cuda"
    # Old clients list a volume as text, new ones as a table; the override's takes the place of the demo's.
    assert "access-student-a" in str(said["trainer"]["volumes"])
    assert "access-demo" not in str(said["trainer"]["volumes"])
    for name in GPU_VARIABLES:
        given = {other: value for other, value in GPU_VARIABLES.items() if other != name}
        with pytest.raises(AssertionError, match="set it to"):
            stack.compose(*GPU_FILES, "config", variables=given)


@pytest.fixture(scope="session")
def demo(stack: Stack) -> str:
    """The trainer's container after `docker-compose up` has brought everything up and the demo has ended."""
    stack.compose("up", "--detach", "--no-build")
    (trainer,) = stack.containers("trainer")
    assert stack.finish(trainer, timeout_s=1800) == 0, stack.log(trainer)
    return trainer


def test_up_alone_ends_with_the_summary_of_the_demo(stack: Stack, demo: str, tmp_path: Path) -> None:
    stack.docker.run("cp", f"{demo}:/runs/demo", str(tmp_path))
    assert broken_promises(tmp_path / "demo") == []
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert (summary["steps"], summary["rollouts_scored"]) == (24, 24 * ROLLOUTS)
    assert "gap recovery" in stack.log(demo)
    (access,), (redis,), (teacher,) = (stack.containers(name) for name in ("access", "redis", "teacher"))
    assert stack.state(access)["ExitCode"] == 0
    assert stack.is_healthy(redis) and stack.is_healthy(teacher)
    totals = stack.pool()["totals"]
    assert totals["completed"] == 24 * ROLLOUTS


def test_redis_lets_nobody_in_without_a_name_and_tenants_reach_their_own_keys_only(stack: Stack, demo: str) -> None:
    def ask(*words: str, user: str = "") -> str:
        (redis,) = stack.containers("redis")
        identity = ("--user", user, "--pass", token, "--no-auth-warning") if user else ()
        return stack.docker.run("exec", redis, "redis-cli", *identity, *words)

    token = stack.docker.run(
        *("run", "--rm", "--volume", f"{PROJECT}_access-demo:/access:ro", "--entrypoint", "cat"),
        *("opd-pool-status", "/access/token"),
    ).strip()
    assert ask("get", "x").startswith("NOAUTH")
    assert ask("ping", user="demo").strip() == "PONG"
    assert ask("get", "opd:{teacher-post}:body:other:1", user="demo").startswith("NOPERM")
    assert ask("flushall", user="demo").startswith("NOPERM")
    assert ask("get", "x", user="health").startswith("NOPERM")
    (redis,) = stack.containers("redis")
    policy = ("redis-cli", "--user", "health", "--pass", "none", "--no-auth-warning", "ping")
    assert stack.docker.run("exec", redis, *policy).strip() == "PONG"


def test_a_teacher_asks_for_tokens(stack: Stack, demo: str) -> None:
    (teacher,) = stack.containers("teacher")
    metrics = "http://127.0.0.1:8080/metrics"
    assert "opd_teacher_ready 1.0" in stack.fetch(teacher, metrics, "/access/metrics.token")
    with pytest.raises(AssertionError, match="401"):
        stack.fetch(teacher, metrics)


class Run:
    """A training run in a container of its own, followed by its step."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._stack = stack
        self.container = f"{PROJECT}-{name}"
        stack.compose(
            *("run", "--detach", "--no-deps", "--name", self.container, "trainer", "train"),
            *("--config", f"{TESTBED}/demo.toml", f"student.model={TESTBED}/models/student-base"),
            *(f"data.files=['{TESTBED}/data/train.jsonl']", "teacher.pool=teacher-post"),
            *("teacher.url=redis://redis:6379/0", "teacher.trust_network=true", f"run_dir=/runs/{name}"),
            *(f"steps={STEPS}", "http.host=0.0.0.0", "http.port=8081", "log.level=info"),
        )
        self._folder = f"/runs/{name}"

    def reach(self, step: int) -> None:
        """Waits until it has done so many steps."""

        def done() -> bool:
            assert self._stack.state(self.container)["Running"], self._stack.log(self.container)
            return self._stack.step(self.container) >= step

        until(done, 400, f"step {step} of {self.container}")

    def summary(self, folder: Path) -> dict[str, Any]:
        """What the run says of itself at its end."""
        self._stack.docker.run("cp", f"{self.container}:{self._folder}/train_summary.json", str(folder))
        found: dict[str, Any] = json.loads((folder / "train_summary.json").read_text())
        return found


def _scale_to_three(stack: Stack) -> list[str]:
    """Three teachers, all healthy, with short leases and in no hurry: the bundled model answers within milliseconds, so
    that whoever harms a replica would nearly always find it with nothing in hand."""
    command = yaml.safe_load((stack.folder / "docker-compose.yml").read_text())["services"]["teacher"]["command"]
    override = {
        "version": "3.9",
        "services": {"teacher": {"command": [*command, f"queue.lease_s={LEASE_S}", "batching.linger_ms=1000"]}},
    }
    (stack.folder / "faults.yml").write_text(yaml.safe_dump(override))
    files = ("--file", "docker-compose.yml", "--file", "faults.yml")
    stack.compose(*files, "up", "--detach", "--no-build", "--no-deps", "--scale", "teacher=3", "teacher")
    teachers = stack.containers("teacher")
    assert len(teachers) == 3
    until(lambda: all(map(stack.is_healthy, teachers)), 240, "three teachers are healthy")
    return teachers


def _holds_requests(stack: Stack, teacher: str) -> bool:
    metrics = stack.fetch(teacher, "http://127.0.0.1:8080/metrics", "/access/metrics.token")
    (waiting,) = [line for line in metrics.splitlines() if line.startswith("opd_teacher_waiting_requests ")]
    return float(waiting.split()[1]) > 0


def _until_a_lease_is_lost(stack: Stack, teacher: str, harm: Callable[[], None], mend: Callable[[], None]) -> None:
    """Harms a replica that holds requests, again where they were answered first, until another has scored them."""
    for _ in range(TRIES):
        until(lambda: stack.is_healthy(teacher), 240, "the teacher is healthy")
        until(lambda: _holds_requests(stack, teacher), 240, "the teacher holds requests")
        before = stack.pool()["totals"].get("redelivered", 0)
        harm()
        time.sleep(2 * LEASE_S)
        was_lost = stack.pool()["totals"].get("redelivered", 0) > before
        mend()
        if was_lost:
            return
    pytest.fail(f"{TRIES} times the replica held nothing")


def test_no_rollout_is_lost_whatever_happens_to_containers(stack: Stack, demo: str, tmp_path: Path) -> None:
    docker, before = stack.docker, stack.pool()["totals"]["completed"]
    first, second, third = _scale_to_three(stack)
    run = Run(stack, "faults")
    run.reach(1)

    _until_a_lease_is_lost(stack, first, lambda: _kill(stack, first), lambda: _run(stack, "start", first))
    _until_a_lease_is_lost(stack, second, lambda: _run(stack, "pause", second), lambda: _run(stack, "unpause", second))

    network = f"{PROJECT}_default"
    for container in (third, run.container):
        docker.run("network", "disconnect", network, container)
        time.sleep(2 * LEASE_S)
        alias = ("--alias", "teacher") if container == third else ()
        docker.run("network", "connect", *alias, network, container)

    (redis,) = stack.containers("redis")
    docker.run("restart", "--time", "20", redis)

    assert stack.state(run.container)["Running"], "it ended before everything had happened"
    assert stack.finish(run.container, timeout_s=900) == 0, stack.log(run.container)
    summary, pool = run.summary(tmp_path), stack.pool()
    assert (summary["steps"], summary["rollouts_lost"]) == (STEPS, 0)
    assert summary["rollouts_sent"] == summary["rollouts_scored"] == STEPS * ROLLOUTS
    # Every rollout was answered, and none twice, though some were delivered twice.
    assert pool["totals"]["completed"] - before == STEPS * ROLLOUTS
    assert (pool["backlog_entries"], pool["dead_letters"]) == (0, 0)
    until(lambda: all(map(stack.is_healthy, (first, second, third))), 120, "all teachers are healthy again")
    assert len(stack.pool()["replicas"]) == 3
    docker.run("rm", "--force", run.container)


def _run(stack: Stack, *arguments: str) -> None:
    stack.docker.run(*arguments)


def _kill(stack: Stack, container: str) -> None:
    stack.docker.run("kill", "--signal", "KILL", container)
    assert stack.state(container)["ExitCode"] == 137


def test_prometheus_finds_every_replica(stack: Stack, demo: str) -> None:
    stack.compose("--profile", "observability", "up", "--detach", "--no-build", "--no-deps", "pool", "prometheus")
    (pool,), (prometheus,) = stack.containers("pool"), stack.containers("prometheus")
    until(lambda: stack.is_healthy(pool), 60, "the pool status process is healthy")

    def targets() -> list[tuple[str, str]]:
        said = stack.fetch(pool, "http://prometheus:9090/api/v1/targets?state=active")
        return [(found["labels"]["job"], found["health"]) for found in json.loads(said)["data"]["activeTargets"]]

    num_teachers = len(stack.containers("teacher"))
    wanted = sorted([("opd-teacher", "up")] * num_teachers + [("opd-pool", "up")])
    until(
        lambda: _or_nothing(lambda: sorted(found for found in targets() if found[0] != "opd-trainer")) == wanted,
        120,
        f"Prometheus scrapes {num_teachers} teachers and the pool",
    )
    assert stack.state(prometheus)["Running"]


def _or_nothing(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (AssertionError, ValueError):
        return None
