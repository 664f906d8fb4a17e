"""The identity of a run: a hash of everything that decides what comes of it, and of nothing else.

What counts is what is given: a setting that a later version adds, at its default, makes no other run of an old one.
Paths, addresses and time-outs do not count. Models and data count by content.
"""

import hashlib
import json
import re
import tomllib
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from experiments.arms import Arm, Command, Evaluation, Model
from testbed.stack import DATA, MODELS

BASE = Path(__file__).with_name("base.toml")
FORMAT = 1
"""Raised when a fault of the trainer has made earlier runs worthless."""
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja")
_NO_PART_OF_THE_MODEL = "card.json"
_KEY_CHARS = 16
_PROBLEM_FILE = re.compile(r"\{data\}/([\w.]+)")


def run_key(arm: Arm, seed: int) -> str:
    """Of one training run."""
    return _hash(
        {"settings": settings_of(arm), "seed": seed, "data": [_file(name) for name in arm.data]} | _models(arm)
    )


def command_key(command: Command) -> str:
    """Of what a command makes; the problem files it names count by their content."""
    files = sorted(set(_PROBLEM_FILE.findall(" ".join(command.arguments))))
    identity = {"command": command.name, "arguments": list(command.arguments), "data": [_file(name) for name in files]}
    return _hash(identity | _models(command))


def evaluation_key(model: Model, evaluation: Evaluation, seed: int | None = None) -> str:
    """Of one model's grades; `seed` chooses among the runs of an arm, None takes the one that others start from."""
    identity = run_key(model, seed) if isinstance(model, Arm) and seed is not None else fingerprint(model)
    return _hash({"model": identity, **asdict(evaluation), "data": _file(evaluation.data)})


def settings_of(arm: Arm) -> dict[str, Any]:
    """The trainer's settings, nested as in its TOML: the base with the arm's own put over it."""
    settings = tomllib.loads(BASE.read_text(encoding="utf-8"))
    for name, value in arm.settings.items():
        *parents, last = name.split(".")
        section = settings
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return settings


def fingerprint(model: Model) -> str:
    """Of a bundled model by its files, of a made one by how it is made."""
    if isinstance(model, str):
        return _folder_hash(MODELS / model)
    return command_key(model) if isinstance(model, Command) else run_key(model, model.seeds[0])


def _models(maker: Arm | Command) -> dict[str, str | None]:
    return {"student": fingerprint(maker.student), "teacher": fingerprint(maker.teacher) if maker.teacher else None}


def _hash(identity: dict[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_CHARS]


@cache
def _file(name: str) -> str:
    return hashlib.sha256((DATA / name).read_bytes()).hexdigest()


@cache
def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _MODEL_FILES for path in folder.glob(pattern)):
        if path.name != _NO_PART_OF_THE_MODEL:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:_KEY_CHARS]
