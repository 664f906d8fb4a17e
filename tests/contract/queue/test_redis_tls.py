"""TLS to real servers: who signed, mutual certificates, the tenant's token as password; all from files."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from opd.client import ScoreClient
from opd.credentials import Credentials
from opd.errors import ConfigError, QueueUnavailableError, UnauthenticatedError
from opd.queue.access import apply_users, hash_password, pool_rules, read_version, tenant_rules
from opd.queue.connection import QueueConnection
from opd.queue.embedded import free_port
from opd.queue.score_client import QueueScoreClient
from opd.queue.score_consumer import ScoreConsumer
from tests.certificates import Authority, Pair

TOKEN = "opd_a-token-of-some-length"


class Secured:
    """A server that also listens with TLS and wants certificates."""

    def __init__(self, make_redis: Any, folder: Path) -> None:
        self.authority = Authority(folder / "ca")
        self.client: Pair = self.authority.issue("client")
        server, self.port = self.authority.issue("server"), free_port()
        self.plain = make_redis(
            f"tls-port {self.port}",
            f'tls-cert-file "{server.cert_file}"',
            f'tls-key-file "{server.key_file}"',
            f'tls-ca-cert-file "{self.authority.ca_file}"',
            "tls-auth-clients yes",
        )
        self.url = f"rediss://127.0.0.1:{self.port}/0"

    def credentials(self, **changes: Any) -> Credentials:
        files = {
            "ca_file": self.authority.ca_file,
            "cert_file": self.client.cert_file,
            "key_file": self.client.key_file,
        }
        return Credentials(**(files | changes))


@pytest.fixture
def secured(make_redis: Any, tmp_path: Path) -> Secured:
    try:
        return Secured(make_redis, tmp_path)
    except QueueUnavailableError:
        if "tls-port" in (tmp_path / "redis0" / "redis.log").read_text():
            pytest.skip("this server was built without TLS")
        raise


async def open_with(secured: Secured, credentials: Credentials) -> None:
    connection = QueueConnection(secured.url, credentials=credentials)
    try:
        await connection.open(patience_s=1.0)
    finally:
        await connection.close()


async def test_only_who_has_a_certificate_and_knows_the_authority_connects(secured: Secured, tmp_path: Path) -> None:
    await open_with(secured, secured.credentials())
    other = Authority(tmp_path / "other")
    stranger = other.issue("stranger")
    for wrong in (
        {"ca_file": other.ca_file},
        {"cert_file": None, "key_file": None},
        {"cert_file": stranger.cert_file, "key_file": stranger.key_file},
    ):
        with pytest.raises(QueueUnavailableError):
            await open_with(secured, secured.credentials(**wrong))


async def test_files_in_the_url_do_as_well(secured: Secured) -> None:
    files = secured.credentials()
    query = f"ssl_ca_certs={files.ca_file}&ssl_certfile={files.cert_file}&ssl_keyfile={files.key_file}"
    connection = QueueConnection(f"{secured.url}?{query}")
    await connection.open(patience_s=1.0)
    await connection.close()


async def test_a_token_is_the_password_of_its_tenant(secured: Secured) -> None:
    admin = QueueConnection(secured.plain.url)
    version, hashes = await read_version(admin), [hash_password("math", TOKEN)]
    users = {"math": tenant_rules("math", ["qwen"], hashes, version=version), "pool": pool_rules(["qwen"], hashes)}
    await apply_users(admin, users, ["qwen"])
    await admin.close()
    credentials = secured.credentials(token=TOKEN, user="math")
    client = await QueueScoreClient.connect(secured.url, pool="qwen", tenant="math", credentials=credentials)
    consumer = ScoreConsumer(
        QueueConnection(secured.url, credentials=secured.credentials(token=TOKEN, user="pool")),
        pool="qwen",
        name="one",
    )
    asking = asyncio.create_task(client.score(rollout_id="r.0.0", num_tokens=5, timeout_ms=9000, body=b"b"))
    (delivery,) = await consumer.take(token_budget=10, wait_s=5.0)
    assert await consumer.complete(delivery, b"scores") and await asking == b"scores"
    await client.close()
    await consumer.close()
    wrong = ScoreClient.connect(
        secured.url, teacher="qwen", tenant="math", credentials=secured.credentials(token="x" * 20)
    )
    with pytest.raises(UnauthenticatedError):
        await wrong.open()
    # TLS ends on both sides: a refused connection is given back when the server has closed it too.
    await asyncio.sleep(0.5)


def test_a_token_never_goes_to_another_machine_in_clear_text() -> None:
    for url in ("redis://queue.example:6379/0", "redis://10.0.0.7/0"):
        with pytest.raises(ConfigError, match="the token would travel in clear text") as caught:
            QueueConnection(url, credentials=Credentials(token=TOKEN))
        assert TOKEN not in caught.value.message
        QueueConnection(url, credentials=Credentials(token=TOKEN, trust_network=True))
        QueueConnection(url.replace("redis:", "rediss:"), credentials=Credentials(token=TOKEN))
    QueueConnection("redis://127.0.0.1/0", credentials=Credentials(token=TOKEN))
    with pytest.raises(ConfigError, match="cannot be read"):
        QueueConnection("rediss://127.0.0.1/0", credentials=Credentials(ca_file=Path("/none")))
