from pathlib import Path

import pytest

from opd.errors import ConfigError
from opd.settings import load_settings
from services.teacher_server.config import TeacherConfig


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
    ):
        with pytest.raises(ConfigError, match=message):
            load_settings(TeacherConfig, None, ["model=m", override])
