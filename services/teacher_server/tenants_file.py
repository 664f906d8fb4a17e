"""Editing the tenants file: what `opd tenants` does, with the comments of whoever else edits it kept.

A new file is written aside and renamed, so that a teacher never reads half of one, and is for its owner alone. What is
to be written is checked first, so that no edit leaves a file that teachers would refuse.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from opd.errors import ConfigError
from opd.paths import PATH_FAULTS, expand_user, path_fault
from services.teacher_server.tenants import MAX_TOKENS_A_TENANT, TenantTable, check_name, hash_token, parse_tenants

_HEADER = "Tenants of the teachers; `opd tenants` edits this file, and running teachers follow it."
_MODE = 0o600


def add_tenant(
    path: Path, name: str, token: str, *, weight: float, max_inflight_tokens: int | None, hidden_states: bool
) -> None:
    """Enters a new tenant; ConfigError when there is one of that name."""
    check_name(name)

    def edit(tenants: Any) -> None:
        if name in tenants:
            raise ConfigError(f"{path}: tenants.{name}: exists; use another name, or opd tenants rotate {name}")
        table = tomlkit.table()
        table["token_sha256"] = [hash_token(token)]
        table["weight"] = weight
        if max_inflight_tokens is not None:
            table["max_inflight_tokens"] = max_inflight_tokens
        table["hidden_states"] = hidden_states
        tenants[name] = table

    _edit(path, edit, create=True)


def add_token(path: Path, name: str, token: str) -> None:
    """Lets a further token in beside the newest of those before; ConfigError while two are valid already."""

    def edit(tenants: Any) -> None:
        hashes = _hashes(path, tenants, name)
        if len(hashes) >= MAX_TOKENS_A_TENANT:
            raise ConfigError(f"{path}: tenants.{name}: is being rotated; finish with --drop-old first")
        tenants[name]["token_sha256"] = [hash_token(token), *hashes]

    _edit(path, edit)


def drop_old_token(path: Path, name: str) -> None:
    """Ends a rotation: only the newest token is let in."""

    def edit(tenants: Any) -> None:
        tenants[name]["token_sha256"] = _hashes(path, tenants, name)[:1]

    _edit(path, edit)


def remove_tenant(path: Path, name: str) -> None:
    """Shuts a tenant out."""

    def edit(tenants: Any) -> None:
        _hashes(path, tenants, name)
        del tenants[name]

    _edit(path, edit)


def write_secret(path: Path, token: str) -> None:
    """A token file for its owner alone; ConfigError when there is a file already."""
    try:
        descriptor = os.open(path.expanduser(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE)
    except PATH_FAULTS as error:
        raise ConfigError(f"token_file={path}: cannot be written ({path_fault(error)}); name another") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")


def _edit(path: Path, edit: Callable[[Any], None], *, create: bool = False) -> TenantTable:
    path = expand_user("tenants_file", path)
    document = _read(path, create=create)
    if "tenants" not in document:
        document["tenants"] = tomlkit.table(is_super_table=True)
    edit(document["tenants"])
    content = tomlkit.dumps(document).encode()
    table = parse_tenants(path, content)
    # Behind a symbolic link the file itself is replaced, not the link.
    _replace(path.resolve(), content)
    return table


def _read(path: Path, *, create: bool) -> Any:
    try:
        if create and not path.exists():
            return _empty()
        content = path.read_bytes()
        parse_tenants(path, content)
        return tomlkit.parse(content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); run opd tenants add") from None
    except TOMLKitError as error:
        raise ConfigError(f"{path}: is not TOML ({error}); correct that line") from None


def _empty() -> Any:
    document = tomlkit.document()
    document.add(tomlkit.comment(_HEADER))
    document.add(tomlkit.nl())
    return document


def _replace(path: Path, content: bytes) -> None:
    try:
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose a folder of yours") from None
    try:
        # mkstemp made it for its owner alone.
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def _hashes(path: Path, tenants: Any, name: str) -> list[str]:
    if name not in tenants:
        raise ConfigError(f"{path}: tenants.{name}: does not exist; known are {', '.join(tenants) or 'none'}")
    return [str(sha256) for sha256 in tenants[name]["token_sha256"]]
