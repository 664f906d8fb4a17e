"""Redis's users as deploy/kubernetes/secrets.sh makes them, in a real Redis 7 with the rendered configuration."""

import os
import re
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis import Redis, exceptions

from opd.queue.embedded import free_port
from tests.kubernetes import MANIFESTS, ROOT, config_file, make_secrets, missing, of_component, render

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Installation:
    """A Redis that runs, and the folder of its secrets."""

    folder: Path
    port: int

    def connect(self, user: str, file: str) -> Redis:
        password = (self.folder / file).read_text(encoding="utf-8").strip()
        return Redis(port=self.port, username=user, password=password, decode_responses=True)


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    server = shutil.which("redis-server")
    if server is None or " v=7" not in subprocess.run([server, "--version"], capture_output=True, text=True).stdout:
        missing("redis-server 7")
    assert server is not None
    make_secrets(tmp_path / "secrets", ["teacher"], ["student"])
    found = Installation(tmp_path / "secrets", free_port())
    objects = render("cpu-demo")
    (redis,) = of_component(objects, "redis")
    text = config_file(objects, redis, "/etc/opd/redis/redis.conf")
    for old, new in (
        ("port 6379", f"bind 127.0.0.1\nport {found.port}"),
        ("dir /data", f"dir {tmp_path}"),
        ("/etc/opd/users/users.acl", str(tmp_path / "users.acl")),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "redis.conf").write_text(text, encoding="utf-8")
    shutil.copy(found.folder / "users.acl", tmp_path / "users.acl")
    with (tmp_path / "redis.log").open("wb") as log:
        process = subprocess.Popen([server, str(tmp_path / "redis.conf")], stdout=log, stderr=log)
    try:
        wait_for(found, process)
        yield found
    finally:
        process.terminate()
        process.wait(20)


def wait_for(installation: Installation, process: "subprocess.Popen[bytes]") -> None:
    give_up_at = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < give_up_at:
        try:
            with installation.connect("pool", "pool.password") as pool:
                pool.ping()
            return
        except exceptions.ConnectionError:
            time.sleep(0.05)
    pytest.fail((installation.folder.parent / "redis.log").read_text(encoding="utf-8"))


def documented_command() -> str:
    """What docs/kubernetes.md has the operator run, without the forwarding of the port."""
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^OPD_REDIS_PASSWORD_FILE=(?:.*\\\n)*.*--apply.*$", text, re.MULTILINE)
    return str(command)


def run_as(installation: Installation, user: str, password_file: str) -> "subprocess.CompletedProcess[str]":
    """That command, as this user."""
    command = documented_command()
    for old, new in (
        ("FOLDER/operator.password", f"FOLDER/{password_file}"),
        ("redis://operator@127.0.0.1:6379/0", f"redis://{user}@127.0.0.1:{installation.port}/0"),
        ("FOLDER", str(installation.folder)),
    ):
        assert old in command
        command = command.replace(old, new)
    # The folder in which make_secrets puts the command.
    path = f"{installation.folder.with_name('bin')}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=False, timeout=100, env=environment
    )


def test_one_user_alone_may_administer_redis(installation: Installation) -> None:
    with installation.connect("operator", "operator.password") as operator:
        users = {line.split()[1]: line.split()[2] for line in operator.acl_list()}
        assert users == {"default": "off", "operator": "on", "pool": "on", "student": "on"}
        for command in (("ACL", "SETUSER", "x"), ("CONFIG", "SET", "maxmemory", "1"), ("FLUSHALL",), ("SHUTDOWN",)):
            allowed = {
                name
                for name, state in users.items()
                if state == "on" and operator.execute_command("ACL", "DRYRUN", name, *command) == "OK"
            }
            assert allowed == {"operator"}, command
        assert operator.execute_command("ACL", "DRYRUN", "student", "PING") == "OK"


def test_the_operator_sets_the_users_of_the_redis_that_runs(installation: Installation) -> None:
    make_secrets(installation.folder, ["teacher"], ["student", "another"])
    with installation.connect("another", "another.token") as another, pytest.raises(exceptions.AuthenticationError):
        another.ping()
    done = run_as(installation, "operator", "operator.password")
    assert done.returncode == 0, done.stderr
    assert "3 users set, removed: none" in done.stdout
    with installation.connect("another", "another.token") as another:
        assert another.ping()
    # Who set them is still there, and so is everybody else.
    with installation.connect("operator", "operator.password") as operator:
        assert set(operator.acl_users()) == {"default", "operator", "pool", "student", "another"}


@pytest.mark.parametrize(("user", "file"), [("pool", "pool.password"), ("student", "student.token")])
def test_teachers_and_students_set_nobodys_rights(installation: Installation, user: str, file: str) -> None:
    done = run_as(installation, user, file)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    with installation.connect("operator", "operator.password") as operator:
        assert set(operator.acl_users()) == {"default", "operator", "pool", "student"}


def test_the_password_of_the_operator_goes_into_no_secret(tmp_path: Path) -> None:
    made = make_secrets(tmp_path / "secrets", ["teacher"], ["student"])
    password = (tmp_path / "secrets" / "operator.password").read_text(encoding="utf-8")
    assert len(password) == 64
    for secret in made:
        assert all(password.encode() not in b64decode(value) for value in secret["data"].values())


def test_a_secret_is_whole_or_not_there(tmp_path: Path) -> None:
    """Making one breaks off half-way; the next run makes it anew."""
    folder, broken = tmp_path / "secrets", tmp_path / "broken"
    broken.mkdir()
    (broken / "tr").write_text("#!/bin/sh\nprintf 0123\nexit 1\n", encoding="utf-8")
    (broken / "tr").chmod(0o755)
    command = [str(MANIFESTS / "secrets.sh"), str(folder), "--pool", "teacher", "--tenant", "student"]
    environment = {**os.environ, "PATH": f"{broken}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert done.returncode != 0 and not (folder / "pool.password").exists()
    make_secrets(folder, ["teacher"], ["student"])
    assert len((folder / "pool.password").read_text(encoding="utf-8")) == 64
    assert not list(folder.glob("*.new"))


@pytest.mark.parametrize("name", ["metrics", "hub"])
def test_a_tenants_token_is_no_other_file(tmp_path: Path, name: str) -> None:
    command = [str(MANIFESTS / "secrets.sh"), str(tmp_path / "secrets"), "--pool", "teacher", "--tenant", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and f"--tenant {name}: {name}.token in FOLDER is" in done.stderr


@pytest.mark.parametrize("name", ["operator", "pool", "default"])
def test_a_tenant_cannot_take_the_name_of_another_user(tmp_path: Path, name: str) -> None:
    command = [str(MANIFESTS / "secrets.sh"), str(tmp_path / "secrets"), "--pool", "teacher", "--tenant", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert f"--tenant {name}: is the name of a Redis user" in done.stderr
    assert not (tmp_path / "secrets").exists()
