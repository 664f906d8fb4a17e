"""Objects as Kubernetes and KEDA define them: nothing unknown, nothing of a wrong type, nothing missing."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kubernetes import (
    MANIFESTS,
    OVERLAYS,
    TOOLS,
    VERSIONS,
    complaints,
    keda_schemas,
    named,
    of_kind,
    render,
    tool,
)

# Tools of some size start, on machines that have other things to do.
pytestmark = pytest.mark.timeout(300)

VALIDATE_KEDA = """
import {ScaledObject} from "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject";
let text = "";
for await (const part of process.stdin) text += part;
new ScaledObject(JSON.parse(text)).validate();
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_what_kubernetes_takes(tmp_path: Path, version: str) -> None:
    paths = []
    for overlay in OVERLAYS:
        paths.append(tmp_path / f"{overlay}.yaml")
        objects = [found for found in render(overlay) if found["kind"] != "ScaledObject"]
        paths[-1].write_text(yaml.safe_dump_all(objects))
    assert complaints(version, *paths) == ""


@pytest.mark.parametrize(("key", "value"), [("replica", 2), ("replicas", "two")])
def test_the_validator_refuses_what_is_wrong(tmp_path: Path, key: str, value: object) -> None:
    teacher = named(render("cpu-demo"), "Deployment", "opd-teacher")
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(teacher | {"spec": teacher["spec"] | {key: value}}))
    assert key in complaints(VERSIONS[-1], path)


def test_the_oldest_version_knows_what_ends_a_job_at_once(tmp_path: Path) -> None:
    """A key that a version does not know is dropped by its servers: the Job would be tried again and again."""
    job = named(render("cpu-demo"), "Job", "opd-trainer")
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    assert complaints(VERSIONS[0], path) == ""
    (rule,) = [rule for rule in job["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    rule["onExitCode"] = rule.pop("onExitCodes")
    path.write_text(yaml.safe_dump(job))
    assert "onExitCode" in complaints(VERSIONS[0], path)


def keda_complaints(scaled_object: dict[str, Any]) -> str:
    """What the schema of KEDA's own definitions says."""
    keda_schemas()
    done = subprocess.run(
        [tool("node"), "--input-type=module", "-e", VALIDATE_KEDA],
        input=json.dumps(scaled_object),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=TOOLS,
    )
    return "" if done.returncode == 0 else done.stderr


def keda_keys(name: str) -> set[str]:
    """Those that the schema knows in a section: its validator passes over others."""
    text = (keda_schemas() / "keda.sh" / "v1alpha1" / f"{name}.d.ts").read_text(encoding="utf-8")
    body = re.search(rf"interface I{name} \{{(.*?)\n\}}", text, re.DOTALL)
    assert body is not None
    return set(re.findall(r'^    "(\w+)"\??:', body.group(1), re.MULTILINE))


def scaled_object() -> dict[str, Any]:
    (found,) = of_kind(render("autoscale"), "ScaledObject")
    return found


def test_the_scaled_object_is_what_keda_takes() -> None:
    found = scaled_object()
    assert keda_complaints(found) == ""
    spec = found["spec"]
    advanced = spec["advanced"]
    assert set(spec) <= keda_keys("ScaledObjectSpec")
    assert set(spec["triggers"][0]) <= keda_keys("ScaleTriggers")
    assert set(advanced) <= keda_keys("AdvancedConfig")
    assert set(advanced["horizontalPodAutoscalerConfig"]) <= keda_keys("HorizontalPodAutoscalerConfig")


@pytest.mark.parametrize(("key", "value"), [("triggers", None), ("minReplicaCount", "none")])
def test_the_schema_of_keda_refuses_what_is_wrong(key: str, value: object) -> None:
    found = scaled_object()
    assert key in keda_complaints(found | {"spec": found["spec"] | {key: value}})


def test_its_behaviour_is_one_of_a_horizontal_autoscaler(tmp_path: Path) -> None:
    """KEDA hands it to one, which has a schema of Kubernetes' own."""
    spec = scaled_object()["spec"]
    path = tmp_path / "autoscaler.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "autoscaling/v2",
                "kind": "HorizontalPodAutoscaler",
                "metadata": {"name": "opd-teacher"},
                "spec": {
                    "scaleTargetRef": spec["scaleTargetRef"],
                    "minReplicas": 1,
                    "maxReplicas": spec["maxReplicaCount"],
                    "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
                },
            }
        )
    )
    assert complaints(VERSIONS[-1], path) == ""


def test_manifests_and_documentation_say_the_same_versions() -> None:
    text = (MANIFESTS.parents[1] / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    assert all(version in text for version in VERSIONS)
