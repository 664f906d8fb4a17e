"""Pods of the manifests as processes on this machine: their commands, variables, files and secrets, on loopback.

What a container mounts lies in a folder of its own here, and paths, host names and ports are put in their place; all
else is as rendered. Nothing of a cluster is imitated beyond that.
"""

import base64
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from opd.lifecycle import DIE_WITH_PARENT
from tests.kubernetes import ROOT, Object, component, container, named, of_component, pod

PATIENCE_S = 300.0
_LAUNCHER = (
    "import os, sys; from opd.lifecycle import die_with_parent; die_with_parent(); os.execvp(sys.argv[1], sys.argv[1:])"
)
"""Whatever it becomes, Redis too, ends when the test's process is gone."""
IN_IMAGE = {
    "/models/": f"{ROOT}/testbed/models/",
    "/opt/opd/lib/python3.11/site-packages/": f"{ROOT}/",
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    give_up_at = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain for {what}"
        time.sleep(0.1)


class Process:
    """One pod's container."""

    def __init__(self, folder: Path, command: list[str], environment: dict[str, str]) -> None:
        self.log_file = folder / "log.txt"
        environment = {**environment, DIE_WITH_PARENT: str(os.getpid()), "PYTHONPATH": str(ROOT)}
        launched = [sys.executable, "-c", _LAUNCHER, *command]
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(launched, cwd=ROOT, env=environment, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def terminate(self) -> None:
        """Asks as the kubelet does."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        if self.is_running:
            self._process.kill()
        self._process.wait(10)


class Cluster:
    """The objects of one overlay and what runs of them; `close` ends exactly that."""

    def __init__(self, folder: Path, objects: list[Object], secrets: list[Object]) -> None:
        self.folder = folder
        self.objects = objects
        self._secrets = secrets
        self.ports = {"opd-redis:6379": free_port(), "opd-pool-status.opd.svc:8090": free_port()}
        self._num_started = 0
        self._running = ExitStack()

    def close(self) -> None:
        """The last first; one that cannot be ended leaves none of the others running."""
        self._running.close()

    def launch(self, folder: Path, command: list[str], environment: dict[str, str]) -> Process:
        """A process that `close` ends."""
        process = Process(folder, command, environment)
        self._running.callback(process.kill)
        return process

    def start(self, name: str, *overrides: str) -> Process:
        """A pod of the one workload of a component, with a folder of its own."""
        (workload,) = of_component(self.objects, name)
        root = self.folder / f"{name}-{self._num_started}"
        self._num_started += 1
        places = self._mount(workload, root)
        main = container(workload)
        command = [self._local(word, places) for word in [*main.get("command", []), *main.get("args", [])]]
        if name != "redis":
            command = [sys.executable, "-m", "services.cli", *command, *overrides]
        return self.launch(root, command, self._environment(main, places))

    def probe(self, name: str) -> bool:
        """The exec probe of the newest pod of a component."""
        (workload,) = of_component(self.objects, name)
        root = max(self.folder.glob(f"{name}-*"), key=lambda path: path.stat().st_ctime)
        main, places = container(workload), self._places(workload, root)
        command = main["readinessProbe"]["exec"]["command"]
        # redis-cli asks at the port of the image.
        command[-1] = command[-1].replace("redis-cli", f"redis-cli -p {self.ports['opd-redis:6379']}", 1)
        environment = self._environment(main, places)
        return subprocess.run(command, env=environment, capture_output=True, timeout=10, check=False).returncode == 0

    def secret(self, name: str, key: str) -> str:
        """What a pod would read."""
        return base64.b64decode(named(self._secrets, "Secret", name)["data"][key]).decode()

    def _places(self, workload: Object, root: Path) -> dict[str, str]:
        """Where what a container mounts lies here; claims outlive a pod, all else is its own."""
        claims = {volume["name"] for volume in pod(workload)["volumes"] if "persistentVolumeClaim" in volume}
        kept = self.folder / f"claims-{component(workload)}"
        return {
            mount["mountPath"]: f"{kept if mount['name'] in claims else root}{mount['mountPath']}"
            for mount in container(workload)["volumeMounts"]
        }

    def _mount(self, workload: Object, root: Path) -> dict[str, str]:
        places = self._places(workload, root)
        volumes = {volume["name"]: volume for volume in pod(workload)["volumes"]}
        for mount in container(workload)["volumeMounts"]:
            folder = Path(places[mount["mountPath"]])
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in self._files(volumes.get(mount["name"], {})).items():
                (folder / name).write_text(self._local(text, places), encoding="utf-8")
        return places

    def _files(self, volume: dict[str, Any]) -> dict[str, str]:
        if "configMap" in volume:
            found: dict[str, str] = named(self.objects, "ConfigMap", volume["configMap"]["name"])["data"]
            return found
        if "secret" in volume:
            name = volume["secret"]["secretName"]
            return {key: self.secret(name, key) for key in named(self._secrets, "Secret", name)["data"]}
        return {}

    def _environment(self, main: Object, places: dict[str, str]) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OPD_")}
        environment["HF_HUB_OFFLINE"] = "1"
        for variable in main.get("env", []):
            value = variable.get("value")
            if value is None:
                reference = variable["valueFrom"]["configMapKeyRef"]
                value = named(self.objects, "ConfigMap", reference["name"])["data"][reference["key"]]
            environment[variable["name"]] = self._local(value, places)
        return environment

    def _local(self, text: str, places: dict[str, str]) -> str:
        found = places | IN_IMAGE | {address: f"127.0.0.1:{port}" for address, port in self.ports.items()}
        # In one go, so that nothing is put in place twice; the longest first.
        pattern = "|".join(re.escape(there) for there in sorted(found, key=len, reverse=True))
        text = re.sub(rf"(?<![\w.-])(?:{pattern})", lambda match: found[match.group()], text)
        # Nothing of a test listens beyond this machine.
        text = text.replace('"0.0.0.0"', '"127.0.0.1"').replace("port 6379", self._redis_listener())
        return text.replace("port = 8090", f"port = {self.ports['opd-pool-status.opd.svc:8090']}")

    def _redis_listener(self) -> str:
        return f"bind 127.0.0.1\nport {self.ports['opd-redis:6379']}"


class Teacher:
    """A replica, asked for its health as the kubelet asks."""

    def __init__(self, cluster: Cluster) -> None:
        self._port = free_port()
        overrides = (f"grpc.port={self._port}", "http.port=0", "torch_threads=1")
        self.process = cluster.start("teacher", *overrides)

    @property
    def is_ready(self) -> bool:
        with grpc.insecure_channel(f"127.0.0.1:{self._port}") as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
