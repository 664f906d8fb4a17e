"""Configuration: strict TOML, dotted overrides, secrets from files.

One pydantic model describes a process. A file fills it, `name.part=value` overrides win over the file, and an unknown
key, a wrong type or a broken cross-field rule is a one-line ConfigError that names the field, the value and the way
out. The resolved configuration can be written back as JSON beside a run.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from opd.errors import ConfigError
from opd.paths import PATH_FAULTS, path_fault


class Settings(BaseModel):
    """Base of every configuration model: unknown keys fail, nothing changes after the start."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


SettingsT = TypeVar("SettingsT", bound=BaseModel)

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What every generator of random numbers takes: numpy's refuse what is negative."""


def load_settings(cls: type[SettingsT], path: Path | None = None, overrides: Sequence[str] = ()) -> SettingsT:
    """Builds `cls` from a TOML file and overrides such as `objective.score_top_k=8`."""
    values = _read_toml(path) if path is not None else {}
    for override in overrides:
        _apply(values, override)
    return check_settings(cls, values)


def check_settings(cls: type[SettingsT], values: Mapping[str, Any]) -> SettingsT:
    """Builds `cls`; `ConfigError` with one line for all that is wrong."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(explain(cls, detail) for detail in error.errors())) from None


def read_secret(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """The value of `NAME`, or the content of the file that `NAME_FILE` points to; None when neither is set."""
    environ = os.environ if environ is None else environ
    file_name = environ.get(f"{name}_FILE")
    if not file_name:
        return environ.get(name) or None
    return _secret_text(f"{name}_FILE={file_name}", Path(file_name), "mount the secret or unset it") or None


def read_secret_file(name: str, path: Path) -> str:
    """The content of the file that the setting `name` points to; ConfigError when it is not there or empty."""
    secret = _secret_text(f"{name}={path}", path, "give the path of a file that can")
    if not secret:
        raise ConfigError(f"{name}={path}: is empty; write the secret into it or unset it")
    return secret


def _secret_text(setting: str, path: Path, way_out: str) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8").strip()
    except PATH_FAULTS as error:
        raise ConfigError(f"{setting}: cannot be read ({path_fault(error)}); {way_out}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read ({error.strerror}); give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: is not TOML ({error}); correct that line") from None


def _apply(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(f"override {override!r}: has no value; write name.part=value")
    *parents, last = name.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section; drop the part after it")
    values[last] = _parse(text)


def _parse(text: str) -> Any:
    """TOML's own reading of the value; bare words are strings, so that quotes are rarely needed in a shell."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None if text == "" else text


def explain(cls: type[BaseModel], detail: ErrorDetails) -> str:
    """One line for one thing that is wrong: field, value, way out."""
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{name}: no such key{_suggestion(cls, detail['loc'])}"
    message = detail["msg"].removeprefix("Value error, ")
    if not name:
        return message
    if detail["type"] == "missing":
        return f"{name}: is required; give it in the file or as {name}=VALUE"
    way_out = _plural(name, detail) or f"{message[0].lower()}{message[1:]}"
    return f"{name}={detail['input']!r}: {way_out}"


def _plural(name: str, detail: ErrorDetails) -> str | None:
    """One value where several belong, in words of the file instead of Python's."""
    value = detail["input"]
    if detail["type"] in ("tuple_type", "list_type"):
        items = [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]
        return f"is no list; write {name}={json.dumps(items, default=str)}"
    if detail["type"] in ("dict_type", "model_type"):
        return f"is no section; write {name}.KEY=VALUE"
    return None


def _suggestion(cls: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Names the nearest key of the section that the unknown one stands in."""
    section: type[BaseModel] | None = cls
    for part in location[:-1]:
        field = section.model_fields.get(str(part)) if section else None
        section = _model_of(field.annotation) if field else None
    known = list(section.model_fields) if section else []
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}" if known else ""


def _model_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
