"""What a run can say of the engine that samples. Light: no torch, no vllm."""

import importlib.util
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from opd.settings import Settings

if TYPE_CHECKING:
    from services.trainer.config import TrainSettings

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


class EngineKind(StrEnum):
    TRANSFORMERS = "transformers"
    """In the trainer, from the very weights that are trained."""
    VLLM = "vllm"
    """In a process of its own, which is given the weights after each step."""


class WeightTransfer(StrEnum):
    AUTO = "auto"
    """`nccl` where the student is on CUDA and `cuda_devices` names another GPU, else `files`."""
    FILES = "files"
    """Safetensors in shared memory; within a machine, whatever computes."""
    NCCL = "nccl"
    """vLLM's own transfer between two GPUs; the trainer's Python needs vLLM too."""


class VllmRolloutSettings(Settings):
    """vLLM as the engine that samples."""

    python: Path | None = None
    """The Python that has vLLM and this project, such as .venv-vllm/bin/python; unset is the trainer's own."""
    cuda_devices: str = ""
    """CUDA_VISIBLE_DEVICES of the engine, such as `1`; empty leaves it the trainer's. Ranks share it out."""
    gpu_memory_utilization: Share = 0.4
    """Share of the GPU's memory for weights, keys and values; what the trainer needs there must be left."""
    kv_cache_bytes: PositiveInt | None = None
    """Bytes of keys and values in place of that share; unset is 1 GiB where there is no GPU."""
    max_num_batched_tokens: PositiveInt | None = None
    """Tokens of one forward pass; unset leaves it to vLLM. Without a GPU at least as many as the longest rollout."""
    enforce_eager: bool = False
    """No compilation, no CUDA graphs: ready sooner, slower."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that share the weights; 1 is what there is."""
    transfer: WeightTransfer = WeightTransfer.AUTO
    """How new weights get there: `files`, `nccl`, or `auto`."""
    weights_folder: Path | None = None
    """Where `files` writes them, one version at a time; unset is /dev/shm, or the folder for temporary files."""
    patience_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """How long the engine may say or read nothing, while it starts, loads or samples, before the run ends."""


def check_engine(settings: "TrainSettings") -> None:
    """Raises `ValueError` naming what the chosen engine does not do, and the way out."""
    rollout = settings.rollout
    if rollout.engine is not EngineKind.VLLM:
        unset = VllmRolloutSettings()
        given = [
            name for name in VllmRolloutSettings.model_fields if getattr(rollout.vllm, name) != getattr(unset, name)
        ]
        if given or rollout.max_drift is not None:
            name = f"rollout.vllm.{given[0]}" if given else "rollout.max_drift"
            raise ValueError(f"{name} with rollout.engine={rollout.engine} would do nothing; set rollout.engine=vllm")
        return
    if rollout.threads is not None:
        raise ValueError(
            f"rollout.threads={rollout.threads} with rollout.engine=vllm would do nothing; set OMP_NUM_THREADS, which "
            "vLLM reads, or leave it out"
        )
    if settings.student.lora is not None and rollout.vllm.transfer is WeightTransfer.NCCL:
        raise ValueError(
            "student.lora with rollout.vllm.transfer=nccl: adapters are merged where weights are written; set "
            "rollout.vllm.transfer=files"
        )
    if rollout.vllm.tensor_parallel_size != 1:
        raise ValueError(
            f"rollout.vllm.tensor_parallel_size={rollout.vllm.tensor_parallel_size}: rollouts are sampled on one GPU; "
            "set it to 1"
        )
    for name, value, whole in (("top_p", rollout.top_p, 1.0), ("top_k", rollout.top_k, -1)):
        if value != whole:
            raise ValueError(
                f"rollout.{name}={value} with rollout.engine=vllm: vLLM gives log-probs before or after the cut, and "
                f"training needs both; set rollout.{name}={whole} or rollout.engine=transformers"
            )
    if settings.deterministic:
        raise ValueError(
            "deterministic=true with rollout.engine=vllm: which rollouts decode together is up to vLLM; set "
            "rollout.engine=transformers"
        )
    _check_python(rollout.vllm.python)


def _check_python(python: Path | None) -> None:
    if python is None and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "rollout.engine=vllm: vLLM is not installed in the trainer's Python; run scripts/setup_vllm.sh and set "
            "rollout.vllm.python=.venv-vllm/bin/python"
        )
    if python is not None and not python.is_file():
        raise ValueError(f"rollout.vllm.python={python}: no such file; run scripts/setup_vllm.sh and give its Python")
