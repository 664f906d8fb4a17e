"""What a manifest names exists: images, ports, paths of probes, variables, keys, options, secrets, times that fit."""

import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.core import TyperGroup

from opd.wire.pb.teacher_pb2 import DESCRIPTOR
from services.cli import app
from services.teacher_server import http_api, pool
from services.trainer import http_api as trainer_http_api
from tests.kubernetes import (
    OVERLAYS,
    ROOT,
    Object,
    component,
    container,
    make_secrets,
    of_component,
    of_kind,
    pod,
    render,
    secrets_of,
    settings_of,
    workloads,
)

# Tools of some size start, on machines that have other things to do.
pytestmark = pytest.mark.timeout(300)

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
HTTP = {"teacher": http_api, "pool-status": pool, "trainer": trainer_http_api}
# Of libraries; ours are looked for in the code.
LIBRARY_VARIABLES = {"OMP_NUM_THREADS", "HF_TOKEN_PATH"}


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(request.param)


def ours(objects: list[Object]) -> list[Object]:
    return [workload for workload in workloads(objects) if component(workload) != "redis"]


def dockerfile(image: str) -> str:
    name = image.partition(":")[0].removeprefix("opd-")
    return (ROOT / "deploy" / "docker" / f"Dockerfile.{name}").read_text(encoding="utf-8")


def test_images_are_ours_of_this_version_or_the_redis_of_compose(objects: list[Object]) -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    for workload in workloads(objects):
        image = container(workload)["image"]
        if component(workload) == "redis":
            assert image == compose["services"]["redis"]["image"]
            continue
        assert image.partition(":")[2].removesuffix("-cuda") == VERSION
        text = dockerfile(image)
        assert f"--uid {pod(workload)['securityContext']['runAsUser']} " in text
        exposed = re.search(r"^EXPOSE (.+)$", text, re.MULTILINE)
        assert exposed is not None
        ports = {str(port["containerPort"]) for port in container(workload)["ports"]}
        assert set(exposed.group(1).split()) == ports
        assert '\nENTRYPOINT ["opd"]\n' in text


def parse(words: list[str]) -> Any:
    """The values of a command's parameters; an unknown command or option is refused, and nothing is run."""
    command: Any = typer.main.get_command(app)
    while isinstance(command, TyperGroup):
        found = command.get_command(None, words[0])  # type: ignore[arg-type]
        assert found is not None, words[0]
        command, words = found, words[1:]
    return command.make_context("opd", list(words)).params


def test_commands_and_options_are_those_of_opd(objects: list[Object]) -> None:
    for workload in ours(objects):
        arguments = container(workload)["args"]
        assert parse(arguments)["config"].as_posix() in arguments
        with pytest.raises(Exception, match="--confog"):
            parse([word.replace("--config", "--confog") for word in arguments])


def test_configuration_loads_and_ports_and_probes_are_those_it_gives(objects: list[Object], tmp_path: Path) -> None:
    for workload in ours(objects):
        settings, main = settings_of(objects, workload, tmp_path), container(workload)
        http, grpc = getattr(settings, "http", settings), getattr(settings, "grpc", None)
        ports = {port["name"]: port["containerPort"] for port in main["ports"]}
        assert ports == {"http": http.port} | ({"grpc": grpc.port} if grpc else {})
        assert {http.host} | ({grpc.host} if grpc else set()) == {"0.0.0.0"}
        source = inspect.getsource(HTTP[component(workload)])
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = main.get(name, {})
            if "grpc" in probe:
                # Without a name: the server as a whole, which our health service answers for.
                assert probe["grpc"] == {"port": grpc.port} or probe["grpc"]["service"] in DESCRIPTOR.services_by_name
            elif "httpGet" in probe:
                assert f'@app.get("{probe["httpGet"]["path"]}")' in source
                assert probe["httpGet"]["port"] in ports


def test_variables_are_read_by_the_code_and_files_they_name_are_mounted(objects: list[Object]) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "opd").rglob("*.py"))
    sources += "".join(path.read_text(encoding="utf-8") for path in (ROOT / "services").rglob("*.py"))
    for workload in ours(objects):
        mounts = dict(map(reversed, secrets_of(workload)))  # type: ignore[arg-type]
        for variable in container(workload)["env"]:
            name = variable["name"]
            assert name in LIBRARY_VARIABLES or f'"{name.removesuffix("_FILE")}"' in sources
            if name.endswith(("_FILE", "_PATH")):
                assert variable["value"].rpartition("/")[0] in mounts


def test_paths_in_the_configuration_are_mounted_or_in_the_image(objects: list[Object], tmp_path: Path) -> None:
    for workload in ours(objects):
        settings = settings_of(objects, workload, tmp_path)
        mounts = [mount["mountPath"] for mount in container(workload)["volumeMounts"]]
        in_image = places_in_image(dockerfile(container(workload)["image"]))
        for path in absolute_paths(settings.model_dump(mode="json", exclude_defaults=True)):
            assert any(path.startswith(f"{folder}/") for folder in mounts) or path in in_image, path


def absolute_paths(value: object) -> list[str]:
    if isinstance(value, dict):
        return [path for each in value.values() for path in absolute_paths(each)]
    if isinstance(value, list):
        return [path for each in value for path in absolute_paths(each)]
    return [value] if isinstance(value, str) and value.startswith("/") else []


def places_in_image(text: str) -> set[str]:
    """Models and data that an image brings: copied, or installed with the package `testbed`."""
    found = set(re.findall(r"^COPY testbed/\S+ (/models/\S+)$", text, re.MULTILINE))
    python = re.search(r"^FROM python:(\d\.\d+)", text, re.MULTILINE)
    if python is not None and re.search(r"^COPY testbed ", text, re.MULTILINE):
        packages = f"/opt/opd/lib/python{python.group(1)}/site-packages"
        places = [*(ROOT / "testbed" / "models").iterdir(), *(ROOT / "testbed" / "data").iterdir()]
        found |= {f"{packages}/{place.relative_to(ROOT)}" for place in places}
    return found


def test_students_ask_for_pools_that_are_there_and_watched_as_the_tenant_whose_token_they_have(
    objects: list[Object], tmp_path: Path
) -> None:
    pools = {settings_of(objects, found, tmp_path).teacher for found in of_component(objects, "teacher")}
    watched = [settings_of(objects, status, tmp_path).teachers for status in of_component(objects, "pool-status")]
    assert {name for names in watched for name in names} == pools
    for trainer in of_component(objects, "trainer"):
        for teacher in settings_of(objects, trainer, tmp_path).teachers_by_name().values():
            assert teacher.pool in pools
            assert f"opd-token-{teacher.tenant}" in dict(secrets_of(trainer))
        assert "--resume" in container(trainer)["args"]


def test_secrets_are_those_that_the_script_makes(objects: list[Object], tmp_path: Path) -> None:
    teachers = [settings_of(objects, found, tmp_path).teacher for found in of_component(objects, "teacher")]
    trainers = [settings_of(objects, found, tmp_path).teacher.tenant for found in of_component(objects, "trainer")]
    (tmp_path / "secrets").mkdir()
    # What only overlays with models of a hub mount, and only if somebody has laid it there.
    if "hub-token" in yaml.safe_dump(objects):
        (tmp_path / "secrets" / "hub.token").write_text("hf_token", encoding="utf-8")
    made = make_secrets(tmp_path / "secrets", teachers, trainers)
    wanted = {name for workload in workloads(objects) for name, _ in secrets_of(workload)}
    assert {secret["metadata"]["name"] for secret in made} == wanted
    keys = {(secret["metadata"]["name"], key) for secret in made for key in secret["data"]}
    for workload in workloads(objects):
        text = yaml.safe_dump([container(workload), *of_kind(objects, "ConfigMap")])
        for name, mount in secrets_of(workload):
            (key,) = {key for secret, key in keys if secret == name}
            assert f"{mount}/{key}" in text


def test_the_script_changes_nothing_that_it_has_made(tmp_path: Path) -> None:
    first = make_secrets(tmp_path / "secrets", ["teacher"], ["student"])
    again = make_secrets(tmp_path / "secrets", ["teacher"], ["student", "another"])
    before, after = ({found["metadata"]["name"]: found["data"] for found in each} for each in (first, again))
    assert set(after) - set(before) == {"opd-token-another"}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"opd-tenants", "opd-redis-users"}


def test_a_pod_is_given_the_time_that_it_takes_to_end(objects: list[Object], tmp_path: Path) -> None:
    for teacher in of_component(objects, "teacher"):
        settings, main = settings_of(objects, teacher, tmp_path), container(teacher)
        word, pause_s = main["lifecycle"]["preStop"]["exec"]["command"]
        assert word == "sleep"
        assert pod(teacher)["terminationGracePeriodSeconds"] >= int(pause_s) + settings.drain_s + 10
        # The address is gone from the service before the listener is.
        readiness = main["readinessProbe"]
        assert int(pause_s) >= readiness["periodSeconds"] * readiness["failureThreshold"]


def test_the_autoscaler_reads_what_the_pool_status_serves(tmp_path: Path) -> None:
    objects = render("autoscale")
    (scaled,) = of_kind(objects, "ScaledObject")
    spec, (trigger,) = scaled["spec"], scaled["spec"]["triggers"]
    (teacher,) = of_component(objects, "teacher")
    assert spec["scaleTargetRef"]["name"] == teacher["metadata"]["name"]
    assert "replicas" not in teacher["spec"], "would be set again at every apply"
    (status,) = [found for found in of_kind(objects, "Service") if found["metadata"]["name"] == "opd-pool-status"]
    host = f"{status['metadata']['name']}.{status['metadata']['namespace']}.svc"
    assert trigger["metadata"]["url"] == f"http://{host}:{status['spec']['ports'][0]['port']}/v1/pool"
    name = settings_of(objects, teacher, tmp_path).teacher
    assert trigger["metadata"]["valueLocation"] == f"teachers.{name}.backlog_tokens"
    # What wakes the pool waits for a node and a model, and must not have run out by then.
    startup = container(teacher)["startupProbe"]
    load_s = startup["periodSeconds"] * startup["failureThreshold"] + spec["pollingInterval"]
    (trainer,) = of_component(objects, "trainer")
    assert settings_of(objects, trainer, tmp_path).teacher.timeout_s >= 1.5 * load_s
    assert spec["initialCooldownPeriod"] > load_s


TOKENIZER_FAMILIES = ("/opt/", "/models/", "Qwen/Qwen3-", "deepseek-ai/DeepSeek-R1-Distill-Qwen-")
"""Models whose names begin alike have one map from ids to tokens, which a student and its teacher must share."""


def family(model: str) -> str:
    return next(start for start in TOKENIZER_FAMILIES if model.startswith(start))


def test_students_and_their_teachers_have_one_vocabulary_and_time_to_load(
    objects: list[Object], tmp_path: Path
) -> None:
    teachers = {}
    for workload in of_component(objects, "teacher"):
        if "args" in container(workload):
            settings = settings_of(objects, workload, tmp_path)
            probe = container(workload)["startupProbe"]
            teachers[settings.teacher] = settings.model, probe["periodSeconds"] * probe["failureThreshold"]
    students = [settings_of(objects, workload, tmp_path) for workload in of_component(objects, "trainer")]
    assert teachers and students
    for student in students:
        for teacher in student.teachers_by_name().values():
            model, load_s = teachers[teacher.pool]
            is_bundled = model.startswith("/") and student.student.model.startswith("/")
            assert is_bundled or family(model) == family(student.student.model), (student.student.model, model)
            assert is_bundled or student.teacher.wait_s > load_s
