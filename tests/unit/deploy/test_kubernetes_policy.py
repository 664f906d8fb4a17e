"""What every pod is held to, and who may reach whom: a linter of policies, and rules of our own."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kubernetes import (
    OVERLAYS,
    WITHOUT_GPU,
    Object,
    component,
    container,
    named,
    of_component,
    of_kind,
    pod,
    pod_labels,
    render,
    tool,
    workloads,
)

# Tools of some size start, on machines that have other things to do.
pytestmark = pytest.mark.timeout(300)

SKIPPED = {
    "CKV_K8S_15": "images that lie on the node already, as in a cluster for trying out, need no registry",
    "CKV_K8S_43": "our own images have no digest before they are built; who pins one does so with kustomize's images",
}
# Nothing is asked over the network: a proxy that is not there ends the linter's attempts at once.
NO_NETWORK = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
# To, from, port; what stands in brackets is outside of the namespace.
REACHES = {
    ("redis", "teacher", "redis"),
    ("redis", "trainer", "redis"),
    ("redis", "pool-status", "redis"),
    ("teacher", "trainer", "grpc"),
    ("teacher", "[monitoring]", "http"),
    ("pool-status", "[monitoring]", "http"),
    ("trainer", "[monitoring]", "http"),
}


def lint(path: Path) -> dict[str, Any]:
    command = [tool("checkov"), "-f", str(path), "--framework", "kubernetes", "--skip-download", "--quiet"]
    command += ["--output", "json", "--skip-check", ",".join(SKIPPED)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, check=False, env={**os.environ, **NO_NETWORK}
    )
    assert done.stdout.startswith("{"), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_linter_of_policies_has_nothing_to_say(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump_all([found for overlay in OVERLAYS for found in render(overlay)]))
    report = lint(path)
    assert report["results"]["failed_checks"] == []
    assert report["summary"]["passed"] > 300 and report["summary"]["parsing_errors"] == 0


def test_the_linter_sees_what_is_wrong(tmp_path: Path) -> None:
    teacher = named(render("cpu-demo"), "Deployment", "opd-teacher")
    pod(teacher)["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(teacher))
    failed = [check["check_id"] for check in lint(path)["results"]["failed_checks"]]
    assert "CKV_K8S_22" in failed


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_confined(overlay: str) -> None:
    objects = render(overlay)
    for workload in workloads(objects):
        spec, main = pod(workload), container(workload)
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] == context["fsGroup"] == 10001
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert main["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert spec["automountServiceAccountToken"] is False
        # Kubernetes would set OPD_REDIS_PORT and the like, which look like variables of ours.
        assert spec["enableServiceLinks"] is False
        assert set(main["resources"]) == {"requests", "limits"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for mount in main["volumeMounts"]:
            assert mount["mountPath"].startswith("/etc/opd/") == mount.get("readOnly", False)
    assert all(account["automountServiceAccountToken"] is False for account in of_kind(objects, "ServiceAccount"))


def expected(overlay: str) -> set[tuple[str, str, str]]:
    return REACHES | {("pool-status", "[keda]", "http")} if overlay == "autoscale" else REACHES


def matches(policy: Object, workload: Object) -> bool:
    labels = policy["spec"]["podSelector"].get("matchLabels", {})
    return bool(labels.items() <= pod_labels(workload).items())


def peers(peer: dict[str, Any], objects: list[Object]) -> set[str]:
    """Components, or the other namespace in brackets."""
    if "namespaceSelector" in peer:
        return {f"[{peer['namespaceSelector']['matchLabels']['kubernetes.io/metadata.name']}]"}
    selector = peer["podSelector"]
    values = selector.get("matchLabels", {}).get("app.kubernetes.io/component")
    allowed = [values] if values else selector["matchExpressions"][0]["values"]
    return {component(workload) for workload in workloads(objects)} & set(allowed)


def allowed(objects: list[Object], direction: str, side: str) -> set[tuple[str, str, str]]:
    """(component that a policy speaks of, peer, port) over all policies with named ports."""
    return {
        (component(workload), peer, port["port"])
        for policy in of_kind(objects, "NetworkPolicy")
        for workload in workloads(objects)
        if matches(policy, workload)
        for rule in policy["spec"].get(direction, [])
        for each in rule[side]
        if "ipBlock" not in each
        for peer in peers(each, objects)
        for port in rule["ports"]
        if isinstance(port["port"], str)
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_who_reaches_whom_is_what_the_documentation_says(overlay: str) -> None:
    objects = render(overlay)
    assert allowed(objects, "ingress", "from") == expected(overlay)
    inside = {(peer, own, port) for own, peer, port in expected(overlay) if not peer.startswith("[")}
    assert allowed(objects, "egress", "to") == inside
    deny = named(objects, "NetworkPolicy", "opd-deny-all")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_only_pods_that_fetch_models_reach_the_world() -> None:
    for overlay in OVERLAYS:
        objects = render(overlay)
        outward = [
            policy
            for policy in of_kind(objects, "NetworkPolicy")
            for rule in policy["spec"].get("egress", [])
            if any("ipBlock" in peer for peer in rule["to"])
        ]
        reached = {
            component(workload) for policy in outward for workload in workloads(objects) if matches(policy, workload)
        }
        assert reached == (set() if overlay in WITHOUT_GPU else {"teacher", "trainer"})


def test_a_gpu_is_asked_for_where_the_cuda_image_runs() -> None:
    for overlay in OVERLAYS:
        objects = render(overlay)
        for workload in [*of_component(objects, "teacher"), *of_component(objects, "trainer")]:
            main = container(workload)
            has_gpu = main["resources"]["limits"].get("nvidia.com/gpu") == "1"
            assert has_gpu == main["image"].endswith("-cuda") == (overlay not in WITHOUT_GPU)
            if has_gpu:
                assert pod(workload)["tolerations"]
