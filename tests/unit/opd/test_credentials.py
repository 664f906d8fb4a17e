from pathlib import Path

import pytest

from opd.credentials import Credentials, is_loopback, load_credentials
from opd.errors import ConfigError
from opd.rpc.client import GrpcScoreClient


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("", False), ("10.0.0.1", False), ("localhost.example", False),
        ("127.0.0.1.example", False), ("2130706433", False),
    ],
)  # fmt: skip
def test_loopback_is_this_machine_alone(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    "target",
    ["grpc://teachers.internal:7000", "10.0.0.1:7000", "grpc://[2001:db8::1]:7000", "dns:///teachers:7000"],
)
def test_a_token_never_goes_to_another_machine_in_clear_text(target: str) -> None:
    with pytest.raises(ConfigError, match="the token would travel in clear text to") as caught:
        GrpcScoreClient(target, credentials=Credentials(token="opd_secret"))
    assert "opd_secret" not in caught.value.message
    GrpcScoreClient(target)
    GrpcScoreClient(target, credentials=Credentials(token="t", trust_network=True))


@pytest.mark.parametrize(
    "target", ["127.0.0.1:1", "grpc://localhost:1", "[::1]:1", "unix:///tmp/s", "grpcs://10.0.0.1:1"]
)
def test_it_goes_over_loopback_and_over_tls(target: str) -> None:
    GrpcScoreClient(target, credentials=Credentials(token="opd_secret"))


def test_tokens_come_from_files_first(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("from-setting\n")
    (tmp_path / "b").write_text("from-environment\n")
    (tmp_path / "empty").write_text("\n")
    environ = {"OPD_TOKEN_FILE": str(tmp_path / "b"), "OPD_TOKEN": "plain"}
    assert load_credentials(token_file=tmp_path / "a", environ=environ).token == "from-setting"
    assert load_credentials(environ=environ).token == "from-environment"
    assert load_credentials(environ={"OPD_TOKEN": "plain"}).token == "plain"
    assert load_credentials(environ={}).token is None
    for name in ("empty", "none"):
        with pytest.raises(ConfigError, match=f"token_file=.*{name}: "):
            load_credentials(token_file=tmp_path / name, environ={})


def test_a_token_is_not_shown_and_certificates_come_in_pairs() -> None:
    assert "secret" not in repr(Credentials(token="secret"))
    with pytest.raises(ConfigError, match="give both or neither"):
        Credentials(cert_file=Path("c.pem"))
