import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from opd.errors import ConfigError, PermissionDeniedError, UnauthenticatedError
from services.teacher_server.tenant_registry import TenantRegistry
from services.teacher_server.tenants import TenantTable, hash_token, load_tenants, new_token
from tests.unit.teacher_server.fake_engine import until

HASH, OTHER_HASH = "ab" * 32, "cd" * 32


def write(path: Path, text: str) -> Path:
    """As an editor does that replaces the file."""
    aside = path.with_suffix(".new")
    aside.write_text(text)
    os.replace(aside, path)
    return path


def table(name: str, *tokens: str, more: str = "") -> str:
    hashes = ", ".join(f'"{hashlib.sha256(token.encode()).hexdigest()}"' for token in tokens)
    return f"[tenants.{name}]\ntoken_sha256 = [{hashes}]\n{more}\n"


def test_a_token_leads_to_its_tenant_also_while_it_is_rotated(tmp_path: Path) -> None:
    path = write(tmp_path / "t.toml", table("math", "new", "old", more="weight = 2.0") + table("code", "c"))
    found = load_tenants(path)
    for token, owner in (("new", "math"), ("old", "math"), ("c", "code")):
        assert found.authenticate(f"Bearer {token}") == owner
    assert found.authenticate("bearer new") == "math"
    assert found.weights() == {"math": 2.0, "code": 1.0} and found.caps() == {}
    write(path, table("math", "new") + table("code", "c", more="max_inflight_tokens = 9"))
    after = load_tenants(path)
    assert after.caps() == {"code": 9}
    with pytest.raises(UnauthenticatedError, match="the token is nobody's"):
        after.authenticate("Bearer old")


@pytest.mark.parametrize("header", [None, "", "new", "Basic new", "Bearer", "Bearer  ", "Bearer nEw", "Bearer new x"])
def test_what_is_no_token_lets_nobody_in(tmp_path: Path, header: str | None) -> None:
    found = load_tenants(write(tmp_path / "t.toml", table("math", "new")))
    with pytest.raises(UnauthenticatedError, match="authorization: ") as caught:
        found.authenticate(header)
    assert "nEw" not in caught.value.message


def test_the_hash_itself_opens_nothing(tmp_path: Path) -> None:
    found = load_tenants(write(tmp_path / "t.toml", table("math", "new")))
    with pytest.raises(UnauthenticatedError):
        found.authenticate(f"Bearer {hash_token('new')}")


def test_every_hash_is_compared_and_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    found = load_tenants(write(tmp_path / "t.toml", table("a", "1", "2") + table("b", "3")))
    assert found.authenticate("Bearer 1") == "a"
    assert len(compared) == 3


def test_tokens_are_long_and_differ() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100 and all(len(token) >= 43 for token in tokens)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tenants.math]\n", r"tenants\.math\.token_sha256: "),
        (f'[tenants.math]\ntoken_sha256 = ["{HASH}"]\nwt = 2\n', r"tenants\.math\.wt: no such key"),
        (f'[tenants.math]\ntoken_sha256 = ["{HASH}"]\nweight = 0\n', r"tenants\.math\.weight=0"),
        (f'[tenants.math]\ntoken_sha256 = ["{HASH}"]\nweight = nan\n', r"tenants\.math\.weight=nan"),
        (f'[tenants.math]\ntoken_sha256 = ["{HASH}"]\nmax_inflight_tokens = 0\n', r"max_inflight_tokens=0"),
        ('[tenants.math]\ntoken_sha256 = ["opd_secret"]\n', "wants one or two SHA-256 in hex, not the token itself"),
        (f'[tenants.math]\ntoken_sha256 = ["{HASH}", "{OTHER_HASH}", "{"0" * 64}"]\n', "one or two SHA-256"),
        (f'[tenants.a]\ntoken_sha256 = ["{HASH}"]\n[tenants.b]\ntoken_sha256 = ["{HASH}"]\n', "a and b have one token"),
        (f'[tenants."*"]\ntoken_sha256 = ["{HASH}"]\n', r"tenant name '\*': must match"),
        (f'[tenants."ma?h"]\ntoken_sha256 = ["{HASH}"]\n', "must match"),
        (f'[tenants."Math"]\ntoken_sha256 = ["{HASH}"]\n', "must match"),
        (f'[tenants."math\\n"]\ntoken_sha256 = ["{HASH}"]\n', "must match"),
        ("[tenant.math]\n", "tenant: no such key; did you mean tenants"),
        ("[tenants", "is not TOML"),
    ],
)
def test_what_a_file_says_wrong_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "t.toml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tenants(path)
    assert str(path) in caught.value.message and "\n" not in caught.value.message
    assert "opd_secret" not in caught.value.message


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tenants(tmp_path / "none.toml")


def gauge() -> Gauge:
    return Gauge("sound", "of the file", registry=CollectorRegistry())


async def test_a_running_registry_follows_the_file_and_keeps_the_last_good_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, sound, told = write(tmp_path / "t.toml", table("math", "m")), gauge(), list[TenantTable]()
    registry = TenantRegistry(path, sound=sound)
    registry.subscribe(told.append)
    watching = asyncio.create_task(registry.watch(0.01))
    write(path, table("math", "m") + table("code", "c", more="weight = 3.0"))
    await until(lambda: len(told) == 2)
    assert registry.table.weights() == {"math": 1.0, "code": 3.0}
    write(path, "[tenants.")
    await until(lambda: sound.collect()[0].samples[0].value == 0)
    assert set(registry.table.tenants) == {"math", "code"} and "the tenants stay as they were" in caplog.text
    path.unlink()
    await until(lambda: "cannot be read" in caplog.text)
    assert registry.table.authenticate("Bearer m") == "math"
    write(path, table("code", "c"))
    await until(lambda: len(told) == 3)
    assert sound.collect()[0].samples[0].value == 1
    with pytest.raises(UnauthenticatedError):
        registry.table.authenticate("Bearer m")
    with pytest.raises(PermissionDeniedError, match="tenant='math': is not served here"):
        registry.table.require("math")
    watching.cancel()


def test_a_file_behind_a_link_is_followed(tmp_path: Path) -> None:
    """As Kubernetes mounts secrets: a link is turned to a new folder."""
    first, second = write(tmp_path / "1.toml", table("a", "1")), write(tmp_path / "2.toml", table("b", "2"))
    link = tmp_path / "tenants.toml"
    link.symlink_to(first)
    registry = TenantRegistry(link, sound=gauge())
    assert not registry.reload_if_changed()
    (tmp_path / "aside").symlink_to(second)
    os.replace(tmp_path / "aside", link)
    assert registry.reload_if_changed() and set(registry.table.tenants) == {"b"}
