"""Who a client says it is, and how it knows whom it talks to: token, certificate authority, own certificate.

One token opens both ways in: over gRPC and HTTP it is sent as a bearer token, to Redis it is the password of the
tenant's user. It never leaves this machine in clear text unless `trust_network` says that the network is private.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from opd.errors import ConfigError
from opd.paths import PATH_FAULTS, path_fault
from opd.settings import read_secret, read_secret_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What a connection is opened with. Example: `Credentials(token="...", ca_file=Path("ca.pem"))`."""

    token: str | None = field(default=None, repr=False)
    """The tenant's; over Redis the password of `user`."""
    user: str = ""
    """Of Redis; empty is the tenant where a tenant connects, and Redis's default user otherwise."""
    ca_file: Path | None = None
    """PEM file of the authorities that may have signed the server's certificate; unset takes the system's."""
    cert_file: Path | None = None
    """PEM file of a certificate of our own, for servers that ask for one."""
    key_file: Path | None = None
    """PEM file of its key."""
    trust_network: bool = False
    """The way to the server is private: a token may travel without TLS."""

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise ConfigError(f"cert_file={self.cert_file}, key_file={self.key_file}: give both or neither")

    def check_way(self, name: str, host: str, *, is_encrypted: bool) -> None:
        """Refuses to send a token in clear text to another machine."""
        if self.token is None or is_encrypted or self.trust_network or is_loopback(host):
            return
        raise ConfigError(
            f"{name}: the token would travel in clear text to {host}; use grpcs:// or rediss://, or "
            "trust_network (--trust-network) where the network is private"
        )


def load_credentials(
    *,
    token_file: Path | None = None,
    ca_file: Path | None = None,
    cert_file: Path | None = None,
    key_file: Path | None = None,
    trust_network: bool = False,
    environ: Mapping[str, str] | None = None,
) -> Credentials:
    """Credentials with the token of a file, or else of `OPD_TOKEN_FILE` or `OPD_TOKEN`."""
    token = read_secret_file("token_file", token_file) if token_file else read_secret("OPD_TOKEN", environ)
    return Credentials(
        token=token, ca_file=ca_file, cert_file=cert_file, key_file=key_file, trust_network=trust_network
    )


def is_loopback(host: str) -> bool:
    """Whether a host or address is this machine alone; a name other than localhost is not."""
    host = host.strip("[]")
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_pem(name: str, path: Path) -> bytes:
    """A certificate or key file; ConfigError in one line when it is none."""
    try:
        content = path.expanduser().read_bytes()
    except PATH_FAULTS as error:
        raise ConfigError(f"{name}={path}: cannot be read ({path_fault(error)}); give a PEM file") from None
    if b"-----BEGIN " not in content:
        raise ConfigError(f"{name}={path}: is no PEM file; give one that holds -----BEGIN ...")
    return content
