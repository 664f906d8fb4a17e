"""Every overlay renders, and what its objects name of each other is there."""

from pathlib import Path

import pytest
import yaml

from tests.kubernetes import (
    OVERLAYS,
    Object,
    container,
    named,
    of_component,
    of_kind,
    pod,
    render,
    render_with,
    selected,
    workloads,
)


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(request.param)


def names(objects: list[Object], kind: str) -> set[str]:
    return {found["metadata"]["name"] for found in of_kind(objects, kind)}


def test_it_lies_in_one_namespace_and_holds_no_secret(objects: list[Object]) -> None:
    assert names(objects, "Namespace") == {"opd"}
    assert {found["metadata"].get("namespace") for found in objects if found["kind"] != "Namespace"} == {"opd"}
    assert of_kind(objects, "Secret") == []


def test_pods_find_what_they_mount_and_run_as(objects: list[Object]) -> None:
    for workload in workloads(objects):
        spec = pod(workload)
        assert spec["serviceAccountName"] in names(objects, "ServiceAccount")
        for volume in spec["volumes"]:
            assert len(volume) == 2, volume
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names(objects, "ConfigMap")
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names(objects, "PersistentVolumeClaim")
        for variable in container(workload).get("env", []):
            if "valueFrom" in variable:
                reference = variable["valueFrom"]["configMapKeyRef"]
                assert reference["key"] in named(objects, "ConfigMap", reference["name"])["data"]
        claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        volumes = {volume["name"] for volume in spec["volumes"]} | claims
        assert {mount["name"] for mount in container(workload)["volumeMounts"]} == volumes


def test_services_lead_to_one_workload_and_its_ports(objects: list[Object]) -> None:
    for service in of_kind(objects, "Service"):
        (workload,) = selected(objects, {"matchLabels": service["spec"]["selector"]})
        ports = {port["name"]: port["containerPort"] for port in container(workload)["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    assert all(
        service["spec"]["clusterIP"] == "None"
        for service in of_kind(objects, "Service")
        if not service["metadata"]["name"].startswith("opd-pool-status")
    )


def test_selectors_and_spread_and_budgets_take_their_own_pods_alone(objects: list[Object]) -> None:
    for workload in of_kind(objects, "Deployment", "StatefulSet"):
        assert selected(objects, workload["spec"]["selector"]) == [workload]
    for teacher in of_component(objects, "teacher"):
        (spread,) = pod(teacher)["topologySpreadConstraints"]
        assert selected(objects, spread["labelSelector"]) == [teacher]
    budgets = [selected(objects, budget["spec"]["selector"]) for budget in of_kind(objects, "PodDisruptionBudget")]
    assert budgets == [[teacher] for teacher in of_component(objects, "teacher")]


def test_policies_speak_of_pods_and_ports_that_exist(objects: list[Object]) -> None:
    ports = {port["name"] for workload in workloads(objects) for port in container(workload)["ports"]}
    for policy in of_kind(objects, "NetworkPolicy"):
        spec = policy["spec"]
        assert selected(objects, spec["podSelector"])
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            for peer in [*rule.get("from", []), *rule.get("to", [])]:
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    assert selected(objects, peer["podSelector"])
            assert {port["port"] for port in rule["ports"] if isinstance(port["port"], str)} <= ports


def test_students_of_several_teachers_have_their_own_of_everything() -> None:
    objects = render("multi-teacher")
    trainers = of_component(objects, "trainer")
    assert len(trainers) == 3 and len(of_component(objects, "teacher")) == 2
    # But for room of the pod's own, and for the hub's token, which is the installation's.
    shared = {"cache", "tmp", "hub-token"}
    volumes = [yaml.safe_dump([v for v in pod(trainer)["volumes"] if v["name"] not in shared]) for trainer in trainers]
    for kind in ("secretName", "claimName"):
        lines = {line.strip() for text in volumes for line in text.splitlines() if kind in line}
        assert len(lines) == 3


def test_an_external_redis_takes_the_place_of_ours(tmp_path: Path) -> None:
    """With the component as the documentation shows it."""
    objects = render_with(tmp_path, "cpu-demo", "external-redis")
    assert of_component(objects, "redis") == []
    assert not {"opd-redis"} & (names(objects, "Service") | names(objects, "NetworkPolicy"))
    urls = {
        value
        for found in of_kind(objects, "ConfigMap")
        for key, value in found["data"].items()
        if key in ("url", "pool-url")
    }
    assert len(urls) == 2 and all(url.startswith("rediss://") for url in urls)
