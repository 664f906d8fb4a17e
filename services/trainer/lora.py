"""Low-rank adapters on a student (peft): put into the model in place, so that everybody else sees the same model.

Sampling, scoring rows and losses go through the very modules that train. A checkpoint stays a plain model with the
adapters merged into its weights, and has them in the standard form in `adapter/` beside:
`peft.PeftModel.from_pretrained(base, CHECKPOINT / "adapter")`. A run goes on from the base and that folder, bit for
bit, and never from the merged weights.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opd.errors import CheckpointError, ConfigError, first_line
from services.trainer.lora_config import LoraSettings

ADAPTER = "adapter"
"""The folder in a checkpoint."""
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_BASE_LAYER = ".base_layer."
_ADAPTER_NAME = "default"
_WRAPPED = "base_model.model."
"""What peft puts before the names of the model's own weights."""


class Adapter:
    """The adapters of one student, which alone are trained from here on."""

    def __init__(self, model: Any, settings: LoraSettings, *, base: str) -> None:
        """Changes `model`, whose weights `base` names. `ConfigError` for target modules that it does not have."""
        from peft import LoraConfig, get_peft_model

        self._config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=sorted(settings.target_modules),
            lora_dropout=0.0,
        )
        _check_targets(model, settings)
        try:
            self._wrapped: Any = get_peft_model(model, self._config)
        except ValueError as error:
            raise ConfigError(
                f"student.lora.target_modules={list(settings.target_modules)}: do not fit {type(model).__name__} "
                f"({first_line(error)}); name linear layers of its decoder"
            ) from error
        self._config.base_model_name_or_path = base

    def write(self, folder: Path, whole: Mapping[str, Tensor] | None = None) -> None:
        """The standard form: configuration and weights. `OSError` or `SafetensorError` when the disk refuses.

        `whole` has the model's weights by the names of its `state_dict`, where its own are in shards.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self._tensors(whole).items()}
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
        is_inference, self._config.inference_mode = self._config.inference_mode, True
        self._config.save_pretrained(folder)
        self._config.inference_mode = is_inference

    def read(self, folder: Path) -> None:
        """Takes over what `write` wrote. `CheckpointError` where it is not there or of other settings."""
        self._check(folder)
        found = _read(folder / _WEIGHTS, load_file)
        if {name: value.shape for name, value in found.items()} != {
            name: value.shape for name, value in self._tensors().items()
        }:
            raise CheckpointError(f"{folder}: the adapter is of another model; resume with its student.model")
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self._wrapped, found)

    def _tensors(self, whole: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        named = None if whole is None else {f"{_WRAPPED}{name}": value for name, value in whole.items()}
        # Asked to find out by itself, the library looks for the base model on the hub.
        tensors: dict[str, Tensor] = get_peft_model_state_dict(self._wrapped, named, save_embedding_layers=False)
        return tensors

    def _check(self, folder: Path) -> None:
        saved = _read(folder / _CONFIG, lambda path: json.loads(path.read_text(encoding="utf-8")))
        for name, setting in (
            ("base_model_name_or_path", "student.model"),
            ("r", "student.lora.rank"),
            ("lora_alpha", "student.lora.alpha"),
            ("target_modules", "student.lora.target_modules"),
        ):
            now = getattr(self._config, name)
            then = saved.get(name)
            if then != now and not (isinstance(now, set) and sorted(then or ()) == sorted(now)):
                raise CheckpointError(
                    f"{folder}: the adapter was trained with {setting}={then}, not {_shown(now)}; resume with the same"
                )


def plain_weights(
    model: nn.Module, weights: Mapping[str, Tensor] | None = None, *, in_place: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """A model's weights by the names that a model without adapters has, adapters merged in; copies only of those.

    What a checkpoint and a rollout engine elsewhere are given, one after the other, so that whoever keeps none has one
    copy at a time. `weights` has the model's by the names of its `state_dict`, where its own are in shards. The model
    itself is unchanged; with `in_place` adapters are merged into the tensors of `weights`, so that none is there twice.
    """
    named: Mapping[str, Tensor] = model.state_dict() if weights is None else weights
    scales = _scales(model) if any(_BASE_LAYER in name for name in named) else {}
    for name, value in named.items():
        if ".lora_" in name:
            continue
        module, is_adapted, rest = name.rpartition(_BASE_LAYER)
        if is_adapted and rest == "weight":
            factor_a, factor_b = (named[f"{module}.lora_{side}.{_ADAPTER_NAME}.weight"] for side in "AB")
            with torch.no_grad():
                delta = ((factor_b @ factor_a) * scales[module]).to(value.dtype)
                value = value.add_(delta) if in_place else value + delta
        yield name.replace(_BASE_LAYER, "."), value


def _scales(model: Any) -> dict[str, float]:
    """alpha / rank by the name of the layer that has an adapter."""
    adapted = ((name, module) for name, module in model.named_modules() if hasattr(module, "get_delta_weight"))
    return {name: module.scaling[_ADAPTER_NAME] for name, module in adapted}


def _check_targets(model: nn.Module, settings: LoraSettings) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in settings.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names} - {"lm_head"})
            raise ConfigError(
                f"student.lora.target_modules: {target} is no linear layer of {type(model).__name__}; it has "
                f"{', '.join(known)}"
            )


def _read(path: Path, reader: Any) -> Any:
    try:
        return reader(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({first_line(error)}); resume with the settings the run was started with, or "
            "remove that checkpoint to go on from the one before"
        ) from error


def _shown(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
