"""Strict configuration: what is wrong is named, with the value and the way out."""

from pathlib import Path

import pytest
from pydantic import Field, model_validator

from opd.errors import ConfigError
from opd.settings import Settings, load_settings, read_secret


class Optim(Settings):
    lr: float = Field(1e-6, gt=0)
    warmup_steps: int = 0


class Run(Settings):
    name: str
    optim: Optim = Optim()
    teacher: Optim | None = None
    tags: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "Run":
        if self.optim.warmup_steps > 10 and self.name == "short":
            raise ValueError(f"optim.warmup_steps={self.optim.warmup_steps}: a short run has 10 steps; lower it")
        return self


def test_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "a"\n[optim]\nlr = 0.5\nwarmup_steps = 3\n')
    run = load_settings(Run, path, ["optim.lr=2e-3", "name=b", "tags=['x', 'y']"])
    assert run == Run(name="b", optim=Optim(lr=2e-3, warmup_steps=3), tags=("x", "y"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"name: is required; give it in the file or as name=VALUE"),
        (["name=a", "optim.lrr=1"], r"optim.lrr: no such key; did you mean lr\?"),
        (["name=a", "colour=red"], r"colour: no such key; known here: name, optim, teacher, tags"),
        (["name=a", "optim.lr=-1"], r"optim.lr=-1: input should be greater than 0"),
        (["name=a", "optim.lr=fast"], r"optim.lr='fast': input should be a valid number"),
        (["name=a", "optim.lr.x=1", "optim.lr=2", "optim.lr.y=1"], r"lr is a value, not a section"),
        (["name"], r"override 'name': has no value"),
        (["name=short", "optim.warmup_steps=11"], r"^optim.warmup_steps=11: a short run has 10 steps; lower it$"),
        (["name=a", "tags=x"], r"^tags='x': is no list; write tags=\[\"x\"\]$"),
        (["name=a", "tags=x, y"], r"write tags=\[\"x\", \"y\"\]$"),
        (["name=a", "tags=3"], r"^tags=3: is no list; write tags=\[3\]$"),
        (["name=a", "tags=['x', 3]"], r"^tags.1=3: input should be a valid string$"),
        (["name=a", "optim=3"], r"^optim=3: is no section; write optim.KEY=VALUE$"),
        (["name=a", "teacher.lrr=1"], r"teacher.lrr: no such key; did you mean lr\?"),
    ],
)
def test_what_is_wrong_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(Run, None, overrides)
    assert "\n" not in str(caught.value)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"optim.lr=0.*; .*colour: no such key"):
        load_settings(Run, None, ["name=a", "optim.lr=0", "colour=red"])


@pytest.mark.parametrize("content", [None, b"name = ", b"\xff\xfe"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"config {path}: "):
        load_settings(Run, path)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Optim().lr = 1.0  # type: ignore[misc]


def test_secrets_come_from_files(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("hunter2\n")
    assert read_secret("PASSWORD", {"PASSWORD_FILE": str(path), "PASSWORD": "other"}) == "hunter2"
    assert read_secret("PASSWORD", {"PASSWORD": "other"}) == "other"
    assert read_secret("PASSWORD", {}) is None
    with pytest.raises(ConfigError, match="PASSWORD_FILE=/nowhere: cannot be read"):
        read_secret("PASSWORD", {"PASSWORD_FILE": "/nowhere"})
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"cannot be read \(is not UTF-8\); mount the secret"):
        read_secret("PASSWORD", {"PASSWORD_FILE": str(path)})
