"""Every way in which a path that a user gave can turn out to be wrong, as one reason to put into a message."""

from pathlib import Path

from opd.errors import ConfigError, first_line

PATH_FAULTS = (OSError, RuntimeError, ValueError)
"""What pathlib raises: no such file, no right to it, too long; no such user behind `~`; a zero byte, or no UTF-8.

Errors of our own tree are among these by their standard parents: catch `OpdError` before.
"""


def path_fault(error: BaseException) -> str:
    """Why, in a few words. Example: `Permission denied`."""
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error).rstrip(".")


def expand_user(setting: str, path: Path) -> Path:
    """The path with `~` and `~user` resolved; ConfigError where there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{setting}={path}: {path_fault(error)}; give the whole path") from None
