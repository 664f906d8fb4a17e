"""Loads the Lua scripts that are the protocol; each is one atomic step in Redis.

A script's text is `common.lua` followed by its own file. It is called by hash and sent whole once when Redis does not
know it yet (after a start or a flush); that is no retry, because an unknown script has done nothing.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from redis.exceptions import NoScriptError

NAMES = ("submit", "probe", "withdraw", "take", "complete", "renew", "hand_back", "requeue")


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """One script's text and the hash Redis knows it by."""

    name: str
    text: str
    sha: str


@cache
def load_script(name: str) -> Script:
    """Reads `lua/<name>.lua` with what all scripts share in front."""
    folder = files("opd.queue") / "lua"
    text = "\n".join((folder / f"{part}.lua").read_text(encoding="ascii") for part in ("common", name))
    return Script(name=name, text=text, sha=hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


async def run_script(redis: Any, name: str, key: str, *args: str | bytes | int | float) -> Any:
    """Runs a script on one connection's client; `key` routes it to the pool's shard."""
    script = load_script(name)
    try:
        return await redis.evalsha(script.sha, 1, key, *args)
    except NoScriptError:
        return await redis.eval(script.text, 1, key, *args)
