"""The loss over the steps, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.trainer.recipes.sft.training import LOSS, VALIDATION_LOSS


def draw_loss_curve(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the training loss of every step and the held-out loss where it was measured."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    ax = figure.add_subplot()
    for key, label, style in ((LOSS, "training batch", "-"), (VALIDATION_LOSS, "held-out examples", "o--")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            ax.plot(*zip(*points, strict=True), style, label=label, markersize=6)
    ax.set(xlabel="optimizer step", ylabel="loss per response token (nats)", title="Fine-tuning on teacher rollouts")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=120)
