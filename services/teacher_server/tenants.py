"""The tenants file: who may ask, with which token, for which share of the teachers.

One TOML file is the truth for gRPC, HTTP and the queue::

    [tenants.math]
    token_sha256 = ["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]
    weight = 2.0
    max_inflight_tokens = 65536
    hidden_states = false

Tokens are random and long, so one SHA-256 is hash enough; the file holds no token. `opd tenants` edits it.
"""

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError, field_validator
from pydantic_core import ErrorDetails

from opd.errors import ConfigError, PermissionDeniedError, UnauthenticatedError
from opd.paths import PATH_FAULTS, path_fault
from opd.queue.keys import check_tenant
from opd.settings import Settings, explain

MAX_TOKENS_A_TENANT = 2
NO_TOKEN = (
    "authorization: has no bearer token; send `authorization: Bearer TOKEN`, from opd by --token-file, "
    "teacher.token_file or OPD_TOKEN_FILE"
)
_MAX_FILE_BYTES = 4 << 20
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Tenant(Settings):
    """One tenant's table."""

    token_sha256: tuple[Sha256, ...] = Field(min_length=1, max_length=MAX_TOKENS_A_TENANT)
    """SHA-256 of each valid token in hex, newest first; two while a token is being rotated."""
    weight: float = Field(default=1.0, ge=0.01, le=100, allow_inf_nan=False)
    """Share of the teachers relative to 1."""
    max_inflight_tokens: int | None = Field(default=None, ge=1)
    """Prompt plus response tokens in flight, per replica over gRPC and HTTP and per pool in the queue; unset takes
    batching.max_tenant_tokens, and in the queue what Redis's memory allows."""
    hidden_states: bool = False
    """The right to hidden states and the output head: together they hand out part of the model."""


class TenantsFile(Settings):
    """The file as a whole."""

    tenants: dict[str, Tenant] = Field(default_factory=dict)
    """By name, [a-z0-9-]{1,63}: names stand in Redis key patterns, so no other character is allowed."""

    @field_validator("tenants")
    @classmethod
    def _names_are_names(cls, tenants: dict[str, Tenant]) -> dict[str, Tenant]:
        owners: dict[str, str] = {}
        for name, tenant in tenants.items():
            if not re.fullmatch(r"[a-z0-9-]{1,63}", name):
                raise ValueError(f"tenant name {name!r}: must match [a-z0-9-]{{1,63}}; rename it")
            for sha256 in tenant.token_sha256:
                if owners.setdefault(sha256, name) != name:
                    raise ValueError(f"{owners[sha256]} and {name} have one token; run opd tenants rotate {name}")
        return tenants


@dataclass(frozen=True, slots=True)
class TenantTable:
    """The tenants that are valid now."""

    tenants: Mapping[str, Tenant]

    def authenticate(self, authorization: str | None) -> str:
        """The tenant whose token an `authorization: Bearer TOKEN` holds; UnauthenticatedError when it is nobody's."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise UnauthenticatedError(NO_TOKEN)
        found = self._owner_of(hash_token(token.strip()))
        if found is None:
            raise UnauthenticatedError(
                "authorization: the token is nobody's; send the tenant's own, or ask the operator for a new one "
                "(opd tenants rotate)"
            )
        return found

    def require(self, name: str) -> Tenant:
        """PermissionDeniedError for a tenant that the file does not name."""
        tenant = self.tenants.get(name)
        if tenant is None:
            raise PermissionDeniedError(f"tenant={name[:80]!r}: is not served here; ask the operator to add it")
        return tenant

    def weights(self) -> dict[str, float]:
        """Share by tenant."""
        return {name: tenant.weight for name, tenant in self.tenants.items()}

    def caps(self) -> dict[str, int]:
        """In-flight tokens of the tenants that have a cap of their own."""
        caps = {name: tenant.max_inflight_tokens for name, tenant in self.tenants.items()}
        return {name: cap for name, cap in caps.items() if cap is not None}

    def _owner_of(self, sha256: str) -> str | None:
        """Compares with every hash, each in constant time, so that the time taken tells nothing."""
        found = None
        for name, tenant in self.tenants.items():
            for known in tenant.token_sha256:
                if hmac.compare_digest(known, sha256):
                    found = name
        return found


def load_tenants(path: Path) -> TenantTable:
    """The file's tenants; ConfigError in one line: file, field, value, way out."""
    try:
        content = path.expanduser().read_bytes()
    except PATH_FAULTS as error:
        raise ConfigError(f"tenants_file={path}: cannot be read ({path_fault(error)}); run opd tenants add") from None
    return parse_tenants(path, content)


def parse_tenants(path: Path, content: bytes) -> TenantTable:
    """As `load_tenants`, of what is to stand in the file."""
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: has {len(content)} bytes, at most {_MAX_FILE_BYTES} are read; split the pool")
    try:
        parsed = TenantsFile.model_validate(tomllib.loads(content.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML ({error}); correct that line") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(_explain(detail) for detail in error.errors())}") from None
    return TenantTable(parsed.tenants)


def _explain(detail: ErrorDetails) -> str:
    if detail["loc"][2:3] == ("token_sha256",):
        # Somebody may have put the token itself there; it is not to reach a log.
        name = ".".join(str(part) for part in detail["loc"])
        return f"{name}: wants one or two SHA-256 in hex, not the token itself; run opd tenants rotate"
    return explain(TenantsFile, detail)


def new_token() -> str:
    """256 random bits, in letters that need no quoting."""
    return "opd_" + secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """What the file and Redis keep of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def check_name(name: str) -> str:
    """Refuses names that could stand for more than themselves in a key pattern."""
    return check_tenant(name)
