"""deploy/kubernetes as kubectl renders it, and the tools that judge it, from .kubernetes/ or PATH.

`scripts/setup_kubernetes.sh` brings what is missing; a test that needs it is skipped until then, and fails under
CI=true.
"""

import copy
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd.settings import load_settings
from services.teacher_server.config import TeacherConfig
from services.teacher_server.pool import PoolConfig
from services.trainer.config import TrainSettings

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu-demo", "gpu", "multi-teacher", "autoscale", "sharded")
WITHOUT_GPU = ("cpu-demo", "sharded")
TOOLS = ROOT / ".kubernetes"
KINDS_WITH_PODS = ("Deployment", "StatefulSet", "Job")
# The oldest and the newest that the documentation names.
VERSIONS = ("1.29", "1.37")
SETTINGS: dict[str, Any] = {"teacher": TeacherConfig, "pool-status": PoolConfig, "trainer": TrainSettings}

Object = dict[str, Any]


def tool(name: str) -> str:
    """Path of a program."""
    for candidate in (TOOLS / "bin" / name, TOOLS / "venv" / "bin" / name):
        if candidate.exists():
            return str(candidate)
    return shutil.which(name) or missing(name)


def keda_schemas() -> Path:
    """Folder of the package that holds the schemas of KEDA's objects."""
    folder = TOOLS / "node_modules" / "@kubernetes-models" / "keda"
    return folder if folder.is_dir() else Path(missing("the schemas of KEDA"))


def missing(what: str) -> str:
    """Ends the test."""
    message = f"{what}: is not here; run scripts/setup_kubernetes.sh"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@functools.cache
def render_text(folder: Path) -> str:
    """What `kubectl apply -k` would send."""
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "kustomize warns"
    return done.stdout


def render(overlay: str) -> list[Object]:
    """The objects of an overlay, by its name; a copy of the caller's own."""
    return copy.deepcopy(_parsed(overlay))


def render_with(folder: Path, overlay: str, *components: str) -> list[Object]:
    """An overlay with components on it, as the documentation shows it; made in the folder."""
    mine = folder / "mine"
    mine.mkdir(exist_ok=True)
    parts = ", ".join(relative(MANIFESTS / "components" / name, mine) for name in components)
    (mine / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: opd\n"
        f"resources: [{relative(MANIFESTS / 'overlays' / overlay, mine)}]\ncomponents: [{parts}]\n"
    )
    return list(yaml.safe_load_all(render_text(mine)))


@functools.cache
def _parsed(overlay: str) -> list[Object]:
    return list(yaml.safe_load_all(render_text(MANIFESTS / "overlays" / overlay)))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    """Those of these kinds, in order."""
    return [found for found in objects if found["kind"] in kinds]


def named(objects: list[Object], kind: str, name: str) -> Object:
    """The one object of this kind and name."""
    (found,) = [found for found in of_kind(objects, kind) if found["metadata"]["name"] == name]
    return found


def workloads(objects: list[Object]) -> list[Object]:
    """What makes pods."""
    return of_kind(objects, *KINDS_WITH_PODS)


def pod(workload: Object) -> Object:
    """The specification of its pods."""
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def pod_labels(workload: Object) -> dict[str, str]:
    """Of its pods."""
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def container(workload: Object) -> Object:
    """Its one container."""
    (found,) = pod(workload)["containers"]
    return dict(found)


def component(workload: Object) -> str:
    """redis, teacher, pool-status or trainer."""
    return pod_labels(workload)["app.kubernetes.io/component"]


def of_component(objects: list[Object], name: str) -> list[Object]:
    """The workloads of a component."""
    return [workload for workload in workloads(objects) if component(workload) == name]


def config_file(objects: list[Object], workload: Object, path: str) -> str:
    """The text that a container of this workload reads at a path which a ConfigMap is mounted to."""
    parent, _, name = path.rpartition("/")
    (mount,) = [mount for mount in container(workload)["volumeMounts"] if mount["mountPath"] == parent]
    (volume,) = [volume for volume in pod(workload)["volumes"] if volume["name"] == mount["name"]]
    text: str = named(objects, "ConfigMap", volume["configMap"]["name"])["data"][name]
    return text


def variables_of(objects: list[Object], workload: Object) -> dict[str, str]:
    """Its environment, with what stands in ConfigMaps looked up."""
    found = {}
    for variable in container(workload).get("env", []):
        if "value" in variable:
            found[variable["name"]] = variable["value"]
        else:
            reference = variable["valueFrom"]["configMapKeyRef"]
            found[variable["name"]] = named(objects, "ConfigMap", reference["name"])["data"][reference["key"]]
    return found


def settings_of(objects: list[Object], workload: Object, folder: Path) -> Any:
    """What its process reads: the mounted file, then the overrides on its command line."""
    arguments = container(workload)["args"]
    path = arguments[arguments.index("--config") + 1]
    copy = folder / Path(path).name
    copy.write_text(config_file(objects, workload, path), encoding="utf-8")
    overrides = [word for word in arguments if "=" in word]
    return load_settings(SETTINGS[component(workload)], copy, overrides)


def secrets_of(workload: Object) -> Iterator[tuple[str, str]]:
    """Name of each Secret that its pods mount, and where."""
    mounts = {mount["name"]: mount["mountPath"] for mount in container(workload)["volumeMounts"]}
    for volume in pod(workload)["volumes"]:
        if "secret" in volume:
            yield volume["secret"]["secretName"], mounts[volume["name"]]


def selects(labels: dict[str, str], selector: dict[str, Any]) -> bool:
    """Whether a selector in its long form takes these labels."""
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(
        rule["operator"] == "In" and labels.get(rule["key"]) in rule["values"]
        for rule in selector.get("matchExpressions", [])
    )


def selected(objects: list[Object], selector: dict[str, Any]) -> list[Object]:
    """What makes pods that it takes."""
    return [workload for workload in workloads(objects) if selects(pod_labels(workload), selector)]


def complaints(version: str, *paths: Path) -> str:
    """Of the strict validator; empty where all files are sound."""
    command = [tool("kubernetes-validate"), "--strict", "--quiet", "-k", version, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def make_secrets(folder: Path, pools: list[str], tenants: list[str]) -> list[Object]:
    """What deploy/kubernetes/secrets.sh makes of a folder; needs no cluster."""
    bin_folder = folder.with_name("bin")
    bin_folder.mkdir(exist_ok=True)
    if not (bin_folder / "kubectl").exists():
        (bin_folder / "kubectl").symlink_to(tool("kubectl"))
        (bin_folder / "opd").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m services.cli "$@"\n')
        (bin_folder / "opd").chmod(0o755)
    options = [word for name in pools for word in ("--pool", name)]
    options += [word for name in tenants for word in ("--tenant", name)]
    done = subprocess.run(
        [str(MANIFESTS / "secrets.sh"), str(folder), *options],
        capture_output=True, text=True, check=False, timeout=250, cwd=ROOT,
        env={**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def relative(target: Path, start: Path) -> str:
    """kustomize takes no absolute paths."""
    up = [".."] * (len(start.resolve().parts) - 1)
    return "/".join([*up, *target.resolve().parts[1:]])
