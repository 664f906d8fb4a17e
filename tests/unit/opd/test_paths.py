"""Paths that cannot be are one line of our own, whatever pathlib says of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from opd.credentials import read_pem
from opd.errors import ConfigError
from opd.paths import expand_user
from opd.settings import read_secret, read_secret_file
from services.teacher_server.tenants import load_tenants
from services.teacher_server.tenants_file import remove_tenant, write_secret

READERS: dict[str, Callable[[Path], object]] = {
    "--token-file": lambda path: read_secret_file("--token-file", path),
    "OPD_TOKEN_FILE": lambda path: read_secret("OPD_TOKEN", {"OPD_TOKEN_FILE": str(path)}),
    "ca_file": lambda path: read_pem("ca_file", path),
    "tenants_file": load_tenants,
    "token_file": lambda path: write_secret(path, "token"),
}


@pytest.mark.parametrize("place", ["~nosuchuser/x", "x" * 300, "a\0b"])
@pytest.mark.parametrize("setting", READERS)
def test_each_reader_names_setting_value_and_way_out(setting: str, place: str) -> None:
    with pytest.raises(ConfigError) as error:
        READERS[setting](Path(place))
    said = error.value.message
    assert said.startswith(f"{setting}={place}: cannot be ") and "\n" not in said
    assert said.rpartition("; ")[2].partition(" ")[0] in {"give", "mount", "run", "name"}


def test_a_user_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"tenants_file=~nosuchuser/x: Could not determine home directory; give"):
        remove_tenant(Path("~nosuchuser/x"), "math")
    assert expand_user("folder", Path("~/x")) == Path.home() / "x"


def test_a_secrets_file_may_lie_in_ones_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "token").write_text("secret\n")
    assert read_secret("OPD_TOKEN", {"OPD_TOKEN_FILE": "~/token"}) == "secret"
