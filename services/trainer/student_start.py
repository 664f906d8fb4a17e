"""The student as a run finds it: all its weights, or a base with adapters, new or as a checkpoint left them."""

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from torch import Tensor, nn

from services.trainer.checkpoint import Checkpoint
from services.trainer.config import TrainSettings
from services.trainer.lora import ADAPTER, Adapter, plain_weights
from services.trainer.models import LoadedModel, load_model, require_savable


class Adapted(TypedDict, total=False):
    """What a checkpoint needs to be told of a student with adapters."""

    weights: dict[str, Tensor]
    write_beside: Callable[[Path], None]


def open_student(
    settings: TrainSettings, checkpoint: Checkpoint | None, *, on_host: bool = False
) -> tuple[LoadedModel, Adapter | None]:
    """Loads the model, with adapters where the run trains those; they go on from their base, never from a merge.

    `on_host` loads it into the machine's memory, for a model that is cut into shards before it goes to a device.
    """
    lora = settings.student.lora
    source = settings.student.model if checkpoint is None or lora is not None else str(checkpoint.folder)
    loaded = load_model(source, device="cpu" if on_host else settings.student.device)
    require_savable(loaded)
    if lora is None:
        return loaded, None
    adapter = Adapter(loaded.model, lora, base=settings.student.model)
    if checkpoint is not None:
        adapter.read(checkpoint.folder / ADAPTER)
    return loaded, adapter


def adapted(model: nn.Module, adapter: Adapter | None, whole: dict[str, Tensor] | None = None) -> Adapted:
    """Merged weights, and the adapter beside them; without an adapter nothing but what is `whole`.

    `whole` has the weights of a student in shards, and adapters are merged into its tensors.
    """
    if adapter is None:
        return {} if whole is None else {"weights": whole}
    return {
        "weights": dict(plain_weights(model, whole, in_place=whole is not None)),
        "write_beside": lambda folder: adapter.write(folder / ADAPTER, whole),
    }
