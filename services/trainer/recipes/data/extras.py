"""Packages that only `opd data` needs: a missing one is one line that says how to get it."""

import importlib
from types import ModuleType

from opd.errors import ConfigError


def import_extra(module: str, package: str) -> ModuleType:
    """The module; `ConfigError` with the way out when its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"semantic: the package {package} is not installed ({error}); install opd-services[recipes] or set "
            "semantic.enabled=false"
        ) from error
