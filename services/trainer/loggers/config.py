"""The section `[loggers]`. Keys and hosts of Weights & Biases do not stand here: its own environment has them."""

import importlib.util
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from opd.errors import ConfigError
from opd.settings import Settings


class WandbMode(StrEnum):
    OFF = "off"
    OFFLINE = "offline"
    """Written into the run folder, to be sent later by `wandb sync`."""
    ONLINE = "online"
    """Sent while the run trains, with the key of `wandb login` or WANDB_API_KEY."""


class WandbSettings(Settings):
    """Weights & Biases."""

    mode: WandbMode = WandbMode.OFF
    """off, offline or online."""
    project: Annotated[str, Field(min_length=1)] = "opd"
    """Where the run is listed."""
    entity: str | None = None
    """User or team; unset takes the account's own."""
    name: str | None = None
    """Of the run; unset takes the run folder's."""


class LoggerSettings(Settings):
    """Loggers beside the run folder's JSON lines."""

    tensorboard: bool = False
    """Event files in `tensorboard/` of the run folder."""
    wandb: WandbSettings = Field(default_factory=WandbSettings)


def require_packages(settings: LoggerSettings) -> None:
    """`ConfigError` for a logger whose package is not installed; light, so it can come before all else."""
    needed = {}
    if settings.tensorboard:
        needed["loggers.tensorboard=true"] = "tensorboardX"
    if settings.wandb.mode is not WandbMode.OFF:
        needed[f"loggers.wandb.mode={settings.wandb.mode}"] = "wandb"
    for field, package in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{field}: {package} is not installed; run `pip install {package}`, or leave it out")
