"""How the processes of one run work together (`[distributed]`), and what several of them cannot do. Light: no torch."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from opd.errors import ConfigError
from opd.settings import Settings
from services.trainer.distributed.share import Share

if TYPE_CHECKING:
    from services.trainer.config import TrainSettings

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DistributedSettings(Settings):
    """Only read where torchrun has started several processes."""

    collective_timeout_s: Seconds = 7200.0
    """How long a rank waits for the others at one place: at least a step's sampling, and an evaluation."""
    silence_s: Seconds = 60.0
    """How long a rank may show no sign of life before the others end."""
    reduces_each_round: bool = True
    """Sums gradients over ranks after each micro-batch, so that each holds a shard of them; false sums once a step and
    holds a whole gradient in fp32 on each."""


def check_ranks(settings: "TrainSettings", num_ranks: int) -> None:
    """`ConfigError` for what a run of one process can do and one of several cannot."""
    if num_ranks == 1:
        return
    Share(num_ranks=num_ranks).check(settings.rollout.prompts_per_step)
    refused = {
        "student.lora": (settings.student.lora is not None, "leave it out"),
        "objective.horizon": (settings.objective.horizon is not None, "leave it out"),
        f"teacher.ema_decay={settings.teacher.ema_decay}": (settings.teacher.ema_decay is not None, "leave it out"),
        f"pipeline.max_policy_lag={settings.pipeline.max_policy_lag}": (
            settings.pipeline.max_policy_lag > 0,
            "set it to 0",
        ),
    }
    for name, (is_set, way_out) in refused.items():
        if is_set:
            raise ConfigError(f"{name}: does not go with {num_ranks} processes; {way_out}, or start a single process")
