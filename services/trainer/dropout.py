"""Switches a model's dropout off for good, however its layers read the rate, and leaves what is saved of it alone."""

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

_PARTS_OF_NAMES = ("dropout", "pdrop", "layerdrop", "drop_prob")
_CONFIG = "config"


def switch_dropout_off(model: nn.Module) -> None:
    """In training mode too, which recomputation needs: two passes over one batch then agree.

    A layer may hold a dropout module, keep the rate as a number of its own, or look it up in its configuration at each
    pass. `model.config` itself stays as it was, since it is written with every checkpoint.
    """
    twins: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_rate(name, value):
                setattr(module, name, 0.0)
        config = vars(module).get(_CONFIG)
        if module is not model and isinstance(config, PreTrainedConfig) and _has_rates(config):
            module.config = twins.setdefault(id(config), _without_rates(config))


def _is_rate(name: str, value: object) -> bool:
    return isinstance(value, float) and any(part in name for part in _PARTS_OF_NAMES)


def _has_rates(config: PreTrainedConfig) -> bool:
    return any(value and _is_rate(name, value) for name, value in vars(config).items())


def _without_rates(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same configuration seen by a layer: whatever is set in either is set in both, but rates are read as zero."""
    kind: Any = type(config)

    class WithoutRates(kind):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            return 0.0 if _is_rate(name, value) else value

    twin = object.__new__(WithoutRates)
    object.__setattr__(twin, "__dict__", vars(config))
    return twin
