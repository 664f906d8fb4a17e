"""What runs of a cluster ends with it, whatever happens to the test; and an autoscaler that fails says so."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from opd.queue.embedded import find_server
from tests.integration.autoscale.autoscaler import Autoscaler
from tests.integration.autoscale.pods import Cluster, Process, wait_for
from tests.kubernetes import ROOT, Object

SLEEP = ["sleep", "600"]
SOON_S = 20.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Of one workload, which serves nobody."""
    found = Cluster(tmp_path, [teacher()], [])
    yield found
    found.close()


def teacher() -> Object:
    container = {"name": "teacher", "args": ["redis", "--help"], "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]}
    labels = {"app.kubernetes.io/component": "teacher"}
    return {
        "kind": "Deployment",
        "metadata": {"name": "opd-teacher", "labels": labels},
        "spec": {"template": {"metadata": {"labels": labels}, "spec": {"containers": [container], "volumes": []}}},
    }


def is_alive(pid: int) -> bool:
    """Also where nobody has waited for it: what is left of a process that ended does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_that_cannot_be_ended_leaves_none_running(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Process] = []
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        started.append(cluster.launch(tmp_path / name, SLEEP, dict(os.environ)))

    def never(timeout_s: float) -> int:
        raise subprocess.TimeoutExpired(SLEEP, timeout_s)

    monkeypatch.setattr(started[1]._process, "wait", never)
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.close()
    wait_for(lambda: not any(is_alive(process.pid) for process in started), "their end", SOON_S)
    monkeypatch.undo()
    assert started[1].wait(10) == -signal.SIGKILL


def test_redis_does_not_outlive_a_test_that_is_killed(tmp_path: Path) -> None:
    command = [find_server(), "--port", "0", "--dir", str(tmp_path), "--unixsocket", "redis.sock"]
    script = (
        "import os, sys, time; from pathlib import Path; from tests.integration.autoscale.pods import Cluster\n"
        f"cluster = Cluster(Path({str(tmp_path)!r}), [], [])\n"
        f"print(cluster.launch(cluster.folder, {command!r}, dict(os.environ)).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    test = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    with test:
        try:
            assert test.stdout is not None
            pid = int(test.stdout.readline())
            wait_for((tmp_path / "redis.sock").exists, "Redis", SOON_S)
        finally:
            test.kill()
    try:
        wait_for(lambda: not is_alive(pid), "its end", SOON_S)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def scaled_object(url: str) -> dict[str, Any]:
    behavior = {"scaleDown": {"stabilizationWindowSeconds": 1}}
    metadata = {"url": url, "valueLocation": "backlog", "targetValue": "1", "activationTargetValue": "0"}
    return {
        "spec": {
            "maxReplicaCount": 2, "cooldownPeriod": 1, "pollingInterval": 0.1, "triggers": [{"metadata": metadata}],
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior}},
        }
    }  # fmt: skip


def test_what_goes_wrong_in_the_autoscalers_thread_is_raised(cluster: Cluster) -> None:
    # No URL that httpx could ask: nothing that an autoscaler may pass over, as it may one that does not answer.
    autoscaler = Autoscaler(cluster, scaled_object("ftp://127.0.0.1\0"), haste=1.0)
    with pytest.raises(RuntimeError, match=r"the autoscaler ended: InvalidURL"):
        wait_for(lambda: not autoscaler.teachers, "an error", SOON_S)
    for look in (lambda: autoscaler.history, autoscaler.stop):
        with pytest.raises(RuntimeError, match="the autoscaler ended"):
            look()


def test_a_pool_that_does_not_answer_is_no_error(cluster: Cluster) -> None:
    autoscaler = Autoscaler(cluster, scaled_object("http://127.0.0.1:1/"), haste=1.0)
    assert autoscaler.history == [1]
    autoscaler.stop()
    assert len(autoscaler.teachers) == 1
