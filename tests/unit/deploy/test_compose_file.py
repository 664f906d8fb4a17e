"""What docker-compose.yml tells the services must be something they understand."""

import inspect
from pathlib import Path
from typing import Any

import yaml

from opd.settings import load_settings
from services import cli
from services.teacher_server.config import TeacherConfig

ROOT = Path(__file__).parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))


def test_the_teacher_takes_its_settings() -> None:
    command = COMPOSE["services"]["teacher"]["command"]
    assert command[:2] == ["teacher", "serve"]
    config = load_settings(TeacherConfig, None, command[2:])
    assert (config.grpc.host, config.http.host) == ("0.0.0.0", "0.0.0.0")
    dockerfile = (ROOT / COMPOSE["services"]["teacher"]["build"]["dockerfile"]).read_text(encoding="utf-8")
    assert f"/models/{config.teacher} " in dockerfile or f" {config.model}\n" in dockerfile
    assert f":{config.http.port}/readyz" in dockerfile


def test_the_trainer_asks_for_the_pool_that_is_served() -> None:
    served = load_settings(TeacherConfig, None, COMPOSE["services"]["teacher"]["command"][2:])
    command = COMPOSE["services"]["trainer"]["command"]
    assert command[0] == "demo"
    options = {name.removeprefix("--").replace("-", "_") for name in command[1:] if name.startswith("--")}
    parameters = inspect.signature(cli.demo).parameters
    assert options <= set(parameters)
    assert parameters["teacher"].default == served.teacher
    assert command[command.index("--redis-url") + 1] == served.redis_url


def test_redis_never_forgets() -> None:
    command = COMPOSE["services"]["redis"]["command"]
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
    assert command[command.index("--appendonly") + 1] == "yes"
