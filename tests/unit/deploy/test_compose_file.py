"""What the compose files tell the services must be something they understand, and what they mount must be made."""

import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd.settings import load_settings
from services import cli
from services.teacher_server.config import TeacherConfig
from services.teacher_server.pool import PoolConfig
from services.trainer.config import TrainSettings

ROOT = Path(__file__).parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
GPU: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text(encoding="utf-8"))
SERVICES, GPU_SERVICES = COMPOSE["services"], GPU["services"]
OURS = ("access", "teacher", "trainer", "pool")
VARIABLES = {
    "TEACHER_MODEL": "/models/teacher", "STUDENT_A_MODEL": "/models/a", "STUDENT_B_MODEL": "/models/b",
    "PROMPTS_A": "a.parquet", "PROMPTS_B": "b.jsonl", "TEACHER_GPUS": "2,3", "TRAINER_A_GPU": "0", "TRAINER_B_GPU": "1",
}  # fmt: skip


def filled(value: str, environ: dict[str, str] | None = None) -> str:
    """With variables put in, as compose does it; a required one must be given."""

    def fill(found: re.Match[str]) -> str:
        name, kind, text = found.groups()
        given = (environ or {}).get(name)
        assert given is not None or kind == ":-", f"{name} has no default"
        return given if given is not None else text

    return re.sub(r"\$\{(\w+)(:-|:\?)([^}]*)\}", fill, value)


def command_of(service: dict[str, Any], environ: dict[str, str] | None = None) -> list[str]:
    return [filled(word, environ) for word in service["command"]]


def test_the_teacher_takes_its_settings() -> None:
    command = command_of(SERVICES["teacher"])
    assert command[:2] == ["teacher", "serve"]
    config = load_settings(TeacherConfig, None, command[2:])
    assert (config.grpc.host, config.http.host) == ("0.0.0.0", "0.0.0.0")
    dockerfile = (ROOT / SERVICES["teacher"]["build"]["dockerfile"]).read_text(encoding="utf-8")
    assert f" {config.model}\n" in dockerfile
    assert f":{config.http.port}/readyz" in dockerfile
    assert f"EXPOSE {config.grpc.port} {config.http.port}" in dockerfile


def test_a_teacher_is_given_the_time_to_drain() -> None:
    config = load_settings(TeacherConfig, None, command_of(SERVICES["teacher"])[2:])
    assert float(SERVICES["teacher"]["stop_grace_period"].removesuffix("s")) > config.drain_s


def test_the_trainer_asks_for_the_pool_that_is_served() -> None:
    served = load_settings(TeacherConfig, None, command_of(SERVICES["teacher"])[2:])
    command = command_of(SERVICES["trainer"])
    assert command[0] == "demo"
    options = {name.removeprefix("--").replace("-", "_") for name in command[1:] if name.startswith("--")}
    parameters = inspect.signature(cli.demo).parameters
    assert {"set_" if name == "set" else name for name in options} <= set(parameters)
    assert parameters["teacher"].default == served.teacher
    assert command[command.index("--redis-url") + 1] == served.redis_url
    further = [value for name, value in itertools.pairwise(command) if name == "--set"]
    settings = load_settings(TrainSettings, None, ["student.model=x", "data.files=['y']", *further])
    dockerfile = (ROOT / SERVICES["trainer"]["build"]["dockerfile"]).read_text(encoding="utf-8")
    assert f":{settings.http.port}/healthz" in dockerfile
    assert settings.http.host == "0.0.0.0"


def test_the_tenant_of_the_demo_gets_a_token_for_the_pool_that_is_served() -> None:
    settings = load_settings(TrainSettings, ROOT / "testbed/demo.toml", ["student.model=x", "data.files=['y']"])
    environment = SERVICES["access"]["environment"]
    assert environment["TENANTS"].split() == [settings.teacher.tenant]
    served = load_settings(TeacherConfig, None, command_of(SERVICES["teacher"])[2:])
    assert environment["POOLS"].split() == [served.teacher]


def test_the_pool_status_process_watches_the_pool_that_is_served() -> None:
    served = load_settings(TeacherConfig, None, command_of(SERVICES["teacher"])[2:])
    config = load_settings(PoolConfig, None, command_of(SERVICES["pool"])[2:])
    assert config.teachers == (served.teacher,)
    dockerfile = (ROOT / SERVICES["pool"]["build"]["dockerfile"]).read_text(encoding="utf-8")
    assert f":{config.port}/healthz" in dockerfile


def test_redis_never_forgets_and_knows_its_users() -> None:
    command = SERVICES["redis"]["command"]
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--aclfile") + 1] == "/access/users.acl"
    assert "access-redis:/access:ro" in SERVICES["redis"]["volumes"]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_container_is_hardened_and_none_is_reached_from_outside(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert not any("docker.sock" in volume for volume in service["volumes"])


def test_secrets_are_files_that_the_access_script_makes() -> None:
    script = (ROOT / "deploy/docker/access.sh").read_text(encoding="utf-8")
    made_at = {volume.split(":")[0]: volume.split(":")[1] for volume in SERVICES["access"]["volumes"]}
    for name, service in SERVICES.items():
        if name == "access":
            continue
        (volume,) = [volume for volume in service["volumes"] if volume.startswith("access-")]
        source, target, mode = volume.split(":")
        assert mode == "ro"
        words = [*service.get("environment", {}).values(), *map(str, service.get("command", ()))]
        for file in re.findall(rf"{target}/([\w.]+)", " ".join(map(str, words))):
            place = made_at[source].replace("/access", "$root").replace("tenants/demo", "tenants/$tenant")
            assert f"{place}/{file}" in script, f"{name} reads {target}/{file}"
    values = [str(value) for service in SERVICES.values() for value in service.get("environment", {}).values()]
    assert not any(re.search(r"password|token", value) and not value.startswith("/access/") for value in values)


def test_no_two_owners_share_a_volume_of_secrets() -> None:
    mounts = [
        volume.split(":")[0]
        for name, service in {**SERVICES, "trainer-b": GPU_SERVICES["trainer-b"]}.items()
        if name != "access"
        for volume in service["volumes"]
        if volume.startswith("access-")
    ]
    assert len(mounts) == len(set(mounts))


def test_the_format_is_one_that_old_clients_take() -> None:
    for document in (COMPOSE, GPU):
        assert document["version"] == "3.9"
        assert set(document) <= {"version", "services", "volumes", "secrets"} | {
            key for key in document if key[:2] == "x-"
        }
        text = yaml.safe_dump(document["services"])
        for word in ("develop:", "gpus:", "start_interval", "required:", "!reset", "!override"):
            assert word not in text.replace("- gpus:/gpus", ""), word


def test_on_gpus_two_students_have_tenants_of_their_own_on_one_pool() -> None:
    teacher = load_settings(TeacherConfig, None, command_of(GPU_SERVICES["teacher"], VARIABLES)[2:])
    tenants = GPU_SERVICES["access"]["environment"]["TENANTS"].split()
    pools = filled(GPU_SERVICES["access"]["environment"]["POOLS"]).split()
    assert pools == [teacher.teacher]
    watched = load_settings(PoolConfig, None, command_of(GPU_SERVICES["pool"])[2:])
    assert list(watched.teachers) == pools
    found = []
    for name in ("trainer", "trainer-b"):
        command = command_of(GPU_SERVICES[name], VARIABLES)
        assert command[:2] == ["train", "--resume"]
        run = load_settings(TrainSettings, None, command[2:])
        assert (run.teacher.pool, run.teacher.url) == (teacher.teacher, teacher.redis_url)
        assert f"access-{run.teacher.tenant}:/access:ro" in GPU_SERVICES[name]["volumes"]
        assert f"access-{run.teacher.tenant}:/access/tenants/{run.teacher.tenant}" in GPU_SERVICES["access"]["volumes"]
        found.append((run.teacher.tenant, run.run_dir))
    assert [tenant for tenant, _ in found] == tenants
    assert len(set(found)) == 2


def test_on_gpus_the_teacher_keeps_what_it_has_of_safety() -> None:
    plain = load_settings(TeacherConfig, None, command_of(SERVICES["teacher"])[2:])
    on_gpu = load_settings(TeacherConfig, None, command_of(GPU_SERVICES["teacher"], VARIABLES)[2:])
    kept = ("tenants_file", "grpc", "http", "queue", "redis_url", "trust_network")
    assert [getattr(on_gpu, name) for name in kept] == [getattr(plain, name) for name in kept]
    for name in ("teacher", "trainer", "trainer-b"):
        (device,) = GPU_SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert device["capabilities"] == ["gpu"]
    # Docker gives every replica the same GPUs; who has which is for the entry point to settle.
    assert GPU_SERVICES["teacher"]["entrypoint"] == ["with-gpus", "${GPUS_PER_REPLICA:-1}", "opd"]


def test_on_gpus_replicas_have_the_shared_memory_that_kubernetes_gives_them() -> None:
    component = yaml.safe_load((ROOT / "deploy/kubernetes/components/gpu-teacher/teacher.yaml").read_text("utf-8"))
    (limit,) = [
        volume["emptyDir"]["sizeLimit"]
        for volume in component["spec"]["template"]["spec"]["volumes"]
        if volume["name"] == "shared-memory"
    ]
    assert GPU_SERVICES["teacher"]["shm_size"] == limit.lower().replace("gi", "gb") == "4gb"


def test_a_hub_token_is_a_file_for_whoever_fetches_models_and_nobody_without_one() -> None:
    (source,) = GPU["secrets"].values()
    assert filled(source["file"]) == "/dev/null"
    for name in ("teacher", "trainer", "trainer-b"):
        assert GPU_SERVICES[name]["secrets"] == list(GPU["secrets"]) == ["hf_token"]
        assert GPU_SERVICES[name]["environment"]["HF_TOKEN_PATH"] == "/run/secrets/hf_token"


def test_every_variable_is_in_the_docs() -> None:
    text = "".join(
        (ROOT / name).read_text(encoding="utf-8") for name in ("docker-compose.yml", "docker-compose.gpu.yml")
    )
    told = (ROOT / "docs/containers.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"\$\{(\w+)[:}]", text)):
        assert f"`{name}`" in told, name


def test_what_is_mounted_from_here_is_here() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            if volume.startswith("./"):
                assert (ROOT / volume.split(":")[0]).exists(), volume


def test_prometheus_asks_where_the_services_listen() -> None:
    document = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    jobs = {job["job_name"]: job for job in document["scrape_configs"]}
    teacher = load_settings(TeacherConfig, None, command_of(SERVICES["teacher"])[2:])
    pool = load_settings(PoolConfig, None, command_of(SERVICES["pool"])[2:])
    assert jobs["opd-teacher"]["dns_sd_configs"][0]["port"] == teacher.http.port
    assert jobs["opd-teacher"]["authorization"]["credentials_file"] == "/run/secrets/metrics_token"
    assert jobs["opd-pool"]["static_configs"][0]["targets"] == [f"pool:{pool.port}"]
