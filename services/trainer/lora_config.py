"""Low-rank adapters as a setting (`[student.lora]`), and what they cannot be combined with. Light: no torch."""

import importlib.util
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from opd.errors import ConfigError
from opd.settings import Settings

if TYPE_CHECKING:
    from services.trainer.config import TrainSettings

_OUTSIDE_LAYERS = ("lm_head", "embed_tokens")


class LoraSettings(Settings):
    """Trains W + (alpha / rank) B A instead of W: A and B alone are trained, and B begins at zero."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rows of A."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    """Scale of the adapter, divided by the rank."""
    target_modules: tuple[Annotated[str, Field(min_length=1)], ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Linear layers by the last part of their names; never the output head or the embedding."""
    dropout: float = 0.0
    """Nothing but 0: the loss is a divergence of the distribution that was sampled."""

    @field_validator("dropout")
    @classmethod
    def _check_dropout(cls, value: float) -> float:
        if value:
            raise ValueError("the loss would be of another distribution than the one sampled; leave it out")
        return value

    @field_validator("target_modules")
    @classmethod
    def _check_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("nothing would be trained; name linear layers, or leave it out")
        outside = [name for name in value if name.rpartition(".")[2] in _OUTSIDE_LAYERS]
        if outside:
            raise ValueError(f"{outside[0]} is no layer of the decoder, and stays as it is; leave it out")
        return value


def check_lora(settings: "TrainSettings") -> None:
    """`ValueError` for a run that adapters do not fit."""
    if settings.student.lora is not None and settings.teacher.ema_decay is not None:
        raise ValueError(
            f"student.lora with teacher.ema_decay={settings.teacher.ema_decay}: the average is over all weights of a "
            "student, of which adapters train none; leave ema_decay out, or train without adapters"
        )


def require_peft(settings: LoraSettings | None) -> None:
    """`ConfigError` where adapters are asked for and their package is not installed; light, so it can come first."""
    if settings is not None and importlib.util.find_spec("peft") is None:
        raise ConfigError("student.lora: peft is not installed; run `pip install peft`, or leave it out")
