"""What is put on an overlay or repeated in one: traces, gRPC, several Redis, hub tokens, and a Job that ends."""

import os
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from services.trainer.run import ALARMED, FAILED, REFUSED
from tests.kubernetes import (
    OVERLAYS,
    VERSIONS,
    WITHOUT_GPU,
    Object,
    complaints,
    component,
    container,
    make_secrets,
    named,
    of_component,
    of_kind,
    pod,
    pod_labels,
    render,
    render_with,
    secrets_of,
    selected,
    settings_of,
    variables_of,
    workloads,
)

pytestmark = pytest.mark.timeout(300)


def check_schema(objects: list[Object], folder: Path) -> None:
    path = folder / "objects.yaml"
    path.write_text(yaml.safe_dump_all(found for found in objects if found["kind"] != "ScaledObject"))
    assert all(complaints(version, path) == "" for version in VERSIONS)


@pytest.mark.parametrize("overlay", ["cpu-demo", "multi-teacher", "sharded"])
def test_traces_go_from_teachers_and_students_to_a_collector_and_nowhere_else(overlay: str, tmp_path: Path) -> None:
    plain, objects = render(overlay), render_with(tmp_path, overlay, "traces")
    check_schema(objects, tmp_path)
    endpoints = set()
    for workload in [*of_component(objects, "teacher"), *of_component(objects, "trainer")]:
        tracing = settings_of(objects, workload, tmp_path).tracing
        assert tracing.enabled
        endpoints.add(tracing.endpoint)
    (endpoint,) = endpoints
    host, port = urlsplit(endpoint).hostname, urlsplit(endpoint).port
    policy = named(objects, "NetworkPolicy", "opd-traces")["spec"]
    assert {component(found) for found in selected(objects, policy["podSelector"])} == {"teacher", "trainer"}
    assert policy["policyTypes"] == ["Egress"]
    (rule,) = policy["egress"]
    (peer,), ports = rule["to"], rule["ports"]
    # One pod of one namespace, the one that the endpoint names, at its port.
    namespace = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    name = peer["podSelector"]["matchLabels"]["app.kubernetes.io/name"]
    assert (f"{name}.{namespace}.svc", [{"port": port}]) == (host, ports)
    # Nothing else is new, and without the component nothing is traced.
    kinds = [(found["kind"], found["metadata"]["name"]) for found in plain]
    added = [found for found in objects if (found["kind"], found["metadata"]["name"]) not in kinds]
    assert added == [named(objects, "NetworkPolicy", "opd-traces")]
    assert not any(settings_of(plain, found, tmp_path).tracing.enabled for found in of_component(plain, "trainer"))


def test_a_student_that_asks_over_grpc_finds_every_replica_by_one_name(tmp_path: Path) -> None:
    objects = render_with(tmp_path, "gpu", "ask-over-grpc")
    check_schema(objects, tmp_path)
    (trainer,) = of_component(objects, "trainer")
    url = urlsplit(settings_of(objects, trainer, tmp_path).teacher.url)
    assert url.scheme == "grpc"
    service = named(objects, "Service", str(url.hostname))
    # Headless: a name with the addresses of all ready replicas; the client goes round them.
    assert service["spec"]["clusterIP"] == "None"
    (teacher,) = selected(objects, {"matchLabels": service["spec"]["selector"]})
    assert teacher["spec"]["replicas"] == 2
    (port,) = [port for port in service["spec"]["ports"] if port["port"] == url.port]
    assert port["targetPort"] == "grpc"
    # tests/unit/deploy/test_kubernetes_policy.py holds that the policies let it through; the token is the tenant's.
    settings = settings_of(objects, trainer, tmp_path).teacher
    assert settings.trust_network and f"opd-token-{settings.tenant}" in dict(secrets_of(trainer))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_whoever_shares_a_pool_shares_its_redis(overlay: str, tmp_path: Path) -> None:
    objects = render(overlay)
    redis_by_pool: dict[str, str] = {}
    for teacher in of_component(objects, "teacher"):
        name = settings_of(objects, teacher, tmp_path).teacher
        assert name not in redis_by_pool
        redis_by_pool[name] = redis_of(objects, teacher)
    assert set(redis_by_pool.values()) == {redis["metadata"]["name"] for redis in of_component(objects, "redis")}
    for status in of_component(objects, "pool-status"):
        watched = settings_of(objects, status, tmp_path).teachers
        assert {redis_by_pool[name] for name in watched} == {redis_of(objects, status)}
    for trainer in of_component(objects, "trainer"):
        for teacher in settings_of(objects, trainer, tmp_path).teachers_by_name().values():
            assert redis_by_pool[teacher.pool] == redis_of(objects, trainer)


def redis_of(objects: list[Object], workload: Object) -> str:
    """The Redis that its URL leads to, by way of a Service."""
    url = urlsplit(variables_of(objects, workload)["OPD_REDIS_URL"])
    service = named(objects, "Service", str(url.hostname))
    assert [port["port"] for port in service["spec"]["ports"]] == [url.port]
    (redis,) = selected(objects, {"matchLabels": service["spec"]["selector"]})
    assert component(redis) == "redis" and redis["spec"]["serviceName"] == service["metadata"]["name"]
    assert url.username == (None if component(workload) == "trainer" else "pool")
    return str(redis["metadata"]["name"])


def test_a_shard_has_its_own_of_everything_that_holds_state() -> None:
    objects = render("sharded")
    shards = {pod_labels(workload)["opd/shard"] for workload in workloads(objects)}
    assert len(shards) == 2
    for name in ("redis", "teacher", "pool-status", "trainer"):
        assert {pod_labels(workload)["opd/shard"] for workload in of_component(objects, name)} == shards
    claims = [claim["metadata"]["name"] for claim in of_kind(objects, "PersistentVolumeClaim")]
    assert len(claims) == len(set(claims)) == 2
    # One call of secrets.sh is for both: the users' file names the pools of both.
    assert {name for workload in workloads(objects) for name, _ in secrets_of(workload)} == {
        "opd-tenants", "opd-redis-users", "opd-pool-password", "opd-metrics-token", "opd-token-student",
    }  # fmt: skip


def test_a_hub_token_is_optional_and_goes_to_whom_fetches_models() -> None:
    for overlay in OVERLAYS:
        objects = render(overlay)
        for workload in workloads(objects):
            fetches = component(workload) in ("teacher", "trainer") and overlay not in WITHOUT_GPU
            volumes = [volume for volume in pod(workload)["volumes"] if volume["name"] == "hub-token"]
            assert bool(volumes) == ("HF_TOKEN_PATH" in variables_of(objects, workload)) == fetches
            assert all(volume["secret"]["optional"] is True for volume in volumes)
            assert not any(volume.get("secret", {}).get("optional") for volume in pod(workload)["volumes"]
                           if volume["name"] != "hub-token")  # fmt: skip


def test_the_script_makes_a_hub_token_of_a_file_that_lies_there(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    without = make_secrets(folder, ["teacher"], ["student"])
    assert "opd-hub-token" not in [secret["metadata"]["name"] for secret in without]
    (folder / "hub.token").write_text("hf_of_somebody", encoding="utf-8")
    secret = named(make_secrets(folder, ["teacher"], ["student"]), "Secret", "opd-hub-token")
    assert b64decode(secret["data"]["token"]) == b"hf_of_somebody"


@pytest.mark.parametrize(("content", "token"), [(None, "None"), ("", "None"), ("hf_of_somebody\n", "'hf_of_somebody'")])
def test_the_hub_s_library_reads_the_file_where_it_is_there(tmp_path: Path, content: str | None, token: str) -> None:
    """With none, and with an empty one, as docker-compose.gpu.yml mounts it by default, it is nobody and no error."""
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", "import huggingface_hub; print(repr(huggingface_hub.get_token()))"],
        env={**environment, "HF_TOKEN_PATH": str(file), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == token


def test_a_run_that_would_end_the_same_is_not_tried_again() -> None:
    (job,) = of_kind(render("cpu-demo"), "Job")
    rules = {rule["action"]: rule for rule in job["spec"]["podFailurePolicy"]["rules"]}
    codes = rules["FailJob"]["onExitCodes"]
    assert (codes["containerName"], codes["operator"]) == (container(job)["name"], "In")
    assert set(codes["values"]) == {REFUSED, ALARMED} and FAILED not in codes["values"]
    # The policy is taken with this alone.
    assert pod(job)["restartPolicy"] == "Never" and job["spec"]["backoffLimit"] > 0


@pytest.mark.parametrize("overrides", [["optim.lr=-1"], ["student.nobody=x"]])
def test_a_configuration_that_is_refused_is_a_code_that_ends_the_job(overrides: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "train", *overrides],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == REFUSED and done.stderr.count("\n") == 1
