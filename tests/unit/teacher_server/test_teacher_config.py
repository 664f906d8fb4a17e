from pathlib import Path

import pytest

from opd.errors import ConfigError
from opd.settings import load_settings
from services.teacher_server.config import TeacherConfig
from services.teacher_server.engines.base import ForwardObserver, ScoringEngine
from services.teacher_server.server import Replica


def test_a_model_is_all_that_must_be_said() -> None:
    config = load_settings(TeacherConfig, None, ["model=some/model"])
    assert (config.model, config.teacher, config.redis_url, config.grpc.host) == (
        "some/model",
        "teacher",
        None,
        "127.0.0.1",
    )


def test_a_file_is_read_and_overrides_win(tmp_path: Path) -> None:
    path = tmp_path / "teacher.toml"
    path.write_text('model = "a"\nteacher = "math"\n[grpc]\nport = 7000\n[batching]\nquantum_tokens = 512\n')
    config = load_settings(TeacherConfig, path, ["grpc.port=0", "batching.max_batch_tokens=99"])
    assert (config.teacher, config.grpc.port, config.batching.max_batch_tokens) == ("math", 0, 99)
    assert config.batching.quantum_tokens == 512


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher=Math", r"teacher='Math': names are \[a-z0-9-\]"),
        ("dtype=int8", "dtype='int8'"),
        ("grpc.port=70000", "grpc.port=70000"),
        ("grpc.prot=1", "grpc.prot: no such key; did you mean port"),
        ("batching.max_tenant_tokens=999999", "max_tenant_tokens=999999: is over batching.max_direct_tokens"),
        ("queue.lease_s=0", "queue.lease_s=0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(TeacherConfig, None, ["model=m", override])
    assert "\n" not in caught.value.message


def test_every_setting_is_explained() -> None:
    for model in (
        TeacherConfig,
        *(type(getattr(TeacherConfig(model="m"), name)) for name in ("grpc", "http", "queue")),
    ):
        silent = [name for name, field in model.model_fields.items() if not field.description]
        assert silent == []


@pytest.mark.parametrize("listener", ["grpc", "http"])
def test_nobody_is_served_off_loopback_without_tokens_and_no_token_without_tls(listener: str) -> None:
    outside, tenants = [f"{listener}.host=0.0.0.0"], ["tenants_file=t.toml"]
    tls = [f"{listener}.tls.cert_file=c.pem", f"{listener}.tls.key_file=k.pem"]
    with pytest.raises(ConfigError, match=rf"{listener}\.host=0\.0\.0\.0: would serve everybody; set tenants_file"):
        load_settings(TeacherConfig, None, ["model=m", *outside, *tls])
    with pytest.raises(ConfigError, match=rf"{listener}\.host=0\.0\.0\.0: tokens would travel in clear text"):
        load_settings(TeacherConfig, None, ["model=m", *outside, *tenants])
    for allowed in ([*tenants, *tls], ["trust_network=true"], [*tenants, "trust_network=true"]):
        load_settings(TeacherConfig, None, ["model=m", *outside, *allowed])
    load_settings(TeacherConfig, None, ["model=m", f"{listener}.host=::1"])


def test_half_a_certificate_is_refused() -> None:
    for override, message in (
        ("grpc.tls.cert_file=c.pem", "give both or neither"),
        ("http.tls.client_ca_file=c.pem", "needs cert_file and key_file"),
        ("queue.key_file=k.pem", "queue=.*cert_file=None, key_file=k.pem: give both or neither"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_settings(TeacherConfig, None, ["model=m", override])


@pytest.mark.parametrize("name", ["ca_file", "cert_file"])
def test_a_certificate_for_the_queue_that_is_not_there_is_found_before_the_model_is_loaded(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "key.pem").write_text("-----BEGIN PRIVATE KEY-----")
    overrides = ["model=m", "redis_url=rediss://127.0.0.1:1/0", f"queue.{name}={tmp_path / 'none.pem'}"]
    if name == "cert_file":
        overrides.append(f"queue.key_file={tmp_path / 'key.pem'}")

    def make_engine(_: ForwardObserver) -> ScoringEngine:
        raise AssertionError("the engine was made")

    with pytest.raises(ConfigError, match=rf"^redis {name}=.*none\.pem: cannot be read"):
        Replica(load_settings(TeacherConfig, None, overrides), make_engine=make_engine)


def test_a_queue_that_is_none_is_found_before_the_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"^redis_url=http://x: must start with redis://"):
        Replica(load_settings(TeacherConfig, None, ["model=m", "redis_url=http://x"]))
