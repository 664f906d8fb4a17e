"""Names that may be asked of the Hugging Face hub, told from paths that are not there.

The hub's own client tries an unreachable hub for half a minute, with a page of retries, before it says so; a mistyped
path would be answered no faster. So whatever looks like a path never goes there, and the hub is looked for once, with
a short limit, before its client is let loose.
"""

import re
from pathlib import Path

from opd.errors import ConfigError

_HUB_NAME = re.compile(r"([\w-][\w.-]*)(/[\w-][\w.-]*)?", re.ASCII)
# Letters only: `Qwen2.5-0.5B` and `set-v1.1` are names, `problems.json` and `model.safetensors` are files.
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]{2,12}")
_HUB_TIMEOUT_S = 5.0


def looks_like_a_path(name: str) -> bool:
    """Whether `name` can only be meant as a path: no form of a hub name, a file's suffix, or a folder that is here."""
    if not _HUB_NAME.fullmatch(name) or _FILE_SUFFIX.fullmatch(Path(name).suffix):
        return True
    owner, slash, _ = name.partition("/")
    return bool(slash) and Path(owner).is_dir()


def check_hub(kind: str, name: str, *, is_cached: bool) -> None:
    """`ConfigError`, within seconds, when the hub would have to be asked for `kind` `name` and cannot be reached.

    What is cached here needs no hub, and a client that was told to stay offline answers quickly by itself.
    """
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_cached or is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # Each generation of the client has its own tree of network errors.
        raise ConfigError(
            f"{kind} {name}: no such path here, and the hub at {constants.ENDPOINT} cannot be reached; correct the "
            "path or the network"
        ) from error
