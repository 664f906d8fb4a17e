import stat
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError
from typer.testing import CliRunner

from opd.errors import ConfigError, InvalidRequestError, OpdError
from opd.queue.keys import PoolKeys
from services.cli import app
from services.teacher_server.tenants import load_tenants


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["tenants", *arguments])
    if result.exception is not None and isinstance(result.exception, OpdError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output.strip()


def test_a_tenant_is_added_rotated_and_removed(tmp_path: Path) -> None:
    file = str(tmp_path / "tenants.toml")
    first = run("add", "math", "-f", file, "--weight", "2", "--max-inflight-tokens", "5000", "--hidden-states")
    text = (tmp_path / "tenants.toml").read_text()
    assert first.startswith("opd_") and first not in text
    assert stat.S_IMODE((tmp_path / "tenants.toml").stat().st_mode) == 0o600
    assert run("list", "-f", file) == "math: weight 2, cap 5000, hidden states yes, 1 valid token"
    second = run("rotate", "math", "-f", file)
    found = load_tenants(Path(file))
    assert found.authenticate(f"Bearer {first}") == found.authenticate(f"Bearer {second}") == "math"
    with pytest.raises(ConfigError, match=r"tenants\.math: is being rotated; finish with --drop-old"):
        run("rotate", "math", "-f", file)
    run("rotate", "math", "-f", file, "--drop-old")
    found = load_tenants(Path(file))
    assert found.authenticate(f"Bearer {second}") == "math"
    with pytest.raises(OpdError, match="the token is nobody's"):
        found.authenticate(f"Bearer {first}")
    run("remove", "math", "-f", file)
    assert load_tenants(Path(file)).tenants == {}


def test_comments_and_order_of_whoever_else_edits_the_file_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    run("add", "math", "-f", str(file))
    mine = "# Shares as agreed in May.\n" + file.read_text().replace("weight = 1.0", "weight = 3.0 # paid for three")
    file.write_text(mine)
    run("add", "code", "-f", str(file))
    run("rotate", "math", "-f", str(file))
    text = file.read_text()
    assert text.startswith("# Shares as agreed in May.\n") and "weight = 3.0 # paid for three" in text
    assert text.index("[tenants.math]") < text.index("[tenants.code]")
    assert list(tmp_path.iterdir()) == [file]


def test_a_token_file_is_for_its_owner_and_never_overwritten(tmp_path: Path) -> None:
    file, token_file = tmp_path / "tenants.toml", tmp_path / "math.token"
    shown = run("add", "math", "-f", str(file), "--token-file", str(token_file))
    token = token_file.read_text().strip()
    assert token not in shown and stat.S_IMODE(token_file.stat().st_mode) == 0o600
    assert load_tenants(file).authenticate(f"Bearer {token}") == "math"
    with pytest.raises(ConfigError, match="cannot be written"):
        run("rotate", "math", "-f", str(file), "--token-file", str(token_file))
    assert len(load_tenants(file).tenants["math"].token_sha256) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "ma*h"], r"tenant='ma\*h': must match"),
        (["add", "math"], r"tenants\.math: exists"),
        (["add", "code", "--weight", "0"], r"tenants\.code\.weight=0"),
        (["remove", "code"], r"tenants\.code: does not exist; known are math"),
        (["rotate", "code"], "does not exist"),
        (["acl", "--teacher", "q*"], r"teacher='q\*': must match"),
        (["acl", "--teacher", "qwen", "--redis-version", "new"], "--redis-version new: is no version"),
        (["acl", "--teacher", "qwen", "--pool-user", "pool"], "--pool-user: goes with --pool-password-file"),
    ],
)
def test_what_cannot_be_is_one_line_and_changes_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    file = tmp_path / "tenants.toml"
    run("add", "math", "-f", str(file))
    before = file.read_bytes()
    with pytest.raises((ConfigError, InvalidRequestError), match=message) as caught:
        run(*arguments, "-f", str(file))
    assert "\n" not in caught.value.message and file.read_bytes() == before


def test_a_broken_file_is_not_touched(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text("[tenants.")
    with pytest.raises(ConfigError, match="is not TOML"):
        run("add", "math", "-f", str(file))
    assert file.read_text() == "[tenants."


def test_redis_users_are_rendered_without_secrets(tmp_path: Path) -> None:
    file, password = tmp_path / "tenants.toml", tmp_path / "pool.password"
    password.write_text("a long enough password\n")
    token = run("add", "math", "-f", str(file))
    text = run(
        "acl", "-f", str(file), "--teacher", "qwen", "--teacher", "llama", "--close-default", "--pool-user", "pool",
        "--pool-password-file", str(password),
    )  # fmt: skip
    math, pool, default = text.splitlines()
    assert math.startswith("user math reset on #") and token not in text and "long enough" not in text
    for teacher in ("qwen", "llama"):
        assert f"~opd:{{{teacher}}}:requests:math" in math.split() and f"~opd:{{{teacher}}}:*" in pool.split()
    assert default == "user default reset ~* &* +@all"


def test_the_token_is_the_password_of_a_running_redis_until_its_tenant_leaves(tmp_path: Path, redis_url: str) -> None:
    file = tmp_path / "tenants.toml"
    token = run("add", "math", "-f", str(file))
    run("add", "code", "-f", str(file))
    said = run("acl", "-f", str(file), "--teacher", "qwen", "--apply", "--redis-url", redis_url)
    assert "2 users set, removed: none; not in a file of Redis's" in said
    with Redis.from_url(f"{redis_url}&username=math&password={token}") as redis:
        assert redis.get(PoolKeys("qwen").info) is None
    run("remove", "code", "-f", str(file))
    assert "removed: code" in run("acl", "-f", str(file), "--teacher", "qwen", "--apply", "--redis-url", redis_url)
    with pytest.raises(ConfigError, match="--close-default: would shut out the user that does it"):
        run("acl", "-f", str(file), "--teacher", "qwen", "--apply", "--redis-url", redis_url, "--close-default")
    with Redis.from_url(redis_url) as admin:
        assert admin.acl_users() == ["default", "math"]
        admin.acl_deluser("math")


ADMIN_PASSWORD = "the operator's own password"


@pytest.fixture
def admin_url(make_redis: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """An operator with no more rights than it needs, at an address that does not look like this machine."""
    server = make_redis(over_tcp=True)
    with Redis.from_url(server.url) as redis:
        redis.execute_command("ACL", "SETUSER", "admin", "on", f">{ADMIN_PASSWORD}", "+acl", "+info")
    monkeypatch.setenv("OPD_REDIS_PASSWORD", ADMIN_PASSWORD)
    return "redis://admin@127.1:" + str(server.url).rpartition(":")[2]


def test_another_user_than_the_default_one_sets_the_users(tmp_path: Path, admin_url: str) -> None:
    file = tmp_path / "tenants.toml"
    token = run("add", "math", "-f", str(file))
    acl = ("acl", "-f", str(file), "--teacher", "qwen", "--apply", "--redis-url", admin_url)
    with pytest.raises(ConfigError, match=r"clear text to 127\.1; .*--trust-network"):
        run(*acl)
    assert "1 users set, removed: none" in run(*acl, "--trust-network")
    with Redis.from_url(admin_url.replace("admin@", f"math:{token}@")) as redis:
        assert redis.get(PoolKeys("qwen").info) is None
    said = run(*acl, "--trust-network", "--close-default")
    assert "2 users set" in said
    assert "open connections of the default user stay open: allow CLIENT KILL" in said
    with Redis.from_url(admin_url.replace("admin@", "")) as redis, pytest.raises(RedisError):
        redis.ping()
    run("remove", "math", "-f", str(file))
    assert "removed: math" in run(*acl, "--trust-network")


def test_whoever_sets_the_users_is_not_among_them(tmp_path: Path, admin_url: str) -> None:
    file = tmp_path / "tenants.toml"
    run("add", "admin", "-f", str(file))
    acl = ("acl", "-f", str(file), "--teacher", "qwen", "--apply", "--redis-url", admin_url, "--trust-network")
    for more in ([], ["--close-default"]):
        with pytest.raises(ConfigError, match=r"^admin: is the user that does this"):
            run(*acl, *more)


def test_closing_the_default_user_cuts_who_is_in(
    tmp_path: Path, make_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, server = tmp_path / "tenants.toml", make_redis()
    run("add", "math", "-f", str(file))
    monkeypatch.setenv("OPD_REDIS_PASSWORD", ADMIN_PASSWORD)
    admin_url = server.url.replace("unix://", "unix://admin@")
    with Redis.from_url(server.url) as before:
        before.execute_command("ACL", "SETUSER", "admin", "on", f">{ADMIN_PASSWORD}", "+acl", "+info", "+client")
        said = run("acl", "-f", str(file), "--teacher", "qwen", "--apply", "--redis-url", admin_url, "--close-default")
        assert "stay open" not in said
        with pytest.raises(RedisError):
            before.ping()
