"""`opd redis`: a real server in the foreground, found by its URL, gone with its command, its data kept."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

ROOT = Path(__file__).parents[3]
Command = subprocess.Popen[str]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Command]]:
    commands: list[Command] = []
    yield commands
    for command in commands:
        if command.poll() is None:
            command.kill()
        command.communicate(timeout=20)


def start(started: list[Command], data_dir: Path) -> tuple[Command, str]:
    """The command and the URL it prints first."""
    arguments = [sys.executable, "-m", "services.cli", "redis", "--data-dir", str(data_dir)]
    command = subprocess.Popen(arguments, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started.append(command)
    assert command.stdout is not None
    return command, command.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_a_queue_until_a_signal_and_keeps_its_data(
    started: list[Command], tmp_path: Path, number: signal.Signals
) -> None:
    command, url = start(started, tmp_path / "redis")
    with Redis.from_url(url) as redis:
        assert redis.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        redis.set("kept", "yes")
    command.send_signal(number)
    assert command.wait(20) == 0
    _, url = start(started, tmp_path / "redis")
    with Redis.from_url(url) as redis:
        assert redis.get("kept") == b"yes"


def test_a_server_that_dies_is_one_line(started: list[Command], tmp_path: Path) -> None:
    command, url = start(started, tmp_path / "redis")
    with Redis.from_url(url) as redis:
        os.kill(redis.info("server")["process_id"], signal.SIGKILL)
    assert command.wait(20) == 1
    assert command.stderr is not None
    assert command.stderr.read().startswith("opd: redis in ")


def test_a_second_one_in_the_same_folder_is_refused(started: list[Command], tmp_path: Path) -> None:
    start(started, tmp_path / "redis")
    second, url = start(started, tmp_path / "redis")
    assert (second.wait(20), url) == (2, "")
    assert second.stderr is not None and "another redis runs in it" in second.stderr.read()
