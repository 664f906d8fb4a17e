"""What of a model's configuration decides its distribution: the same for a teacher's identity and a student's."""

from collections.abc import Mapping
from typing import Any

_VOLATILE_KEYS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def identifying_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what the tool that wrote it put there for itself."""
    return {name: value for name, value in config.items() if name not in _VOLATILE_KEYS}
