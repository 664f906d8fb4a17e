"""What is to be looked at, as said on the command line."""

from dataclasses import dataclass, field
from pathlib import Path

from opd.credentials import Credentials


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One examination. Example: `Plan(redis_url="redis://localhost:6379/0", teachers=("qwen",))`."""

    redis_url: str | None = None
    teachers: tuple[str, ...] = ()
    """Pools, `name` or `name@fingerprint`."""
    grpc_urls: tuple[str, ...] = ()
    tenant: str = ""
    """Set: seen as this tenant's client sees it. Empty: as an operator or a replica does."""
    credentials: Credentials = field(default_factory=Credentials)
    """Of the gRPC calls, and of Redis where a tenant is given."""
    redis_credentials: Credentials = field(default_factory=Credentials)
    """Of Redis where no tenant is given."""
    scores: bool = False
    """Whether one token is to be scored through each pool and address."""
    tenants_file: Path | None = None
    secret_files: tuple[tuple[str, Path], ...] = ()
    """By the setting or variable that names them."""
    plain_secrets: tuple[str, ...] = ()
    """Variables that hold a secret themselves."""
    folders: tuple[Path, ...] = ()
    """Where something is going to be written."""
    patience_s: float = 3.0
    """Of each question to a server."""
