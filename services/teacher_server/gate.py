"""Who may do what: one gate for gRPC, HTTP and the queue.

A caller proves to be a tenant (a token over gRPC and HTTP, its Redis user in the queue), and may then ask in that
tenant's name alone. Without a tenants file the gate is open.
"""

from opd.errors import PermissionDeniedError, UnauthenticatedError
from services.teacher_server.tenant_registry import TenantRegistry
from services.teacher_server.tenants import NO_TOKEN


class Gate:
    """Judges by the table that is valid at the moment of the call."""

    def __init__(self, registry: TenantRegistry | None = None) -> None:
        self._registry = registry

    @property
    def is_open(self) -> bool:
        """Nobody is told apart."""
        return self._registry is None

    def authenticate(self, authorization: str | None) -> str | None:
        """The tenant behind the header, None where the gate is open; raises UnauthenticatedError."""
        return None if self._registry is None else self._registry.table.authenticate(authorization)

    def check_request(self, authenticated: str | None, named: str, *, wants_hidden_states: bool = False) -> None:
        """Raises PermissionDeniedError for another tenant's name and for rights the tenant does not have."""
        if self._registry is None:
            return
        if authenticated is None:
            raise _nobody()
        if named != authenticated:
            raise PermissionDeniedError(
                f"tenant={named[:80]!r}: the token is that of {authenticated}; name that one in the request"
            )
        if wants_hidden_states:
            self.check_hidden_states(authenticated)

    def check_hidden_states(self, tenant: str | None) -> None:
        """Raises PermissionDeniedError for a tenant without the right to hidden states and the output head."""
        if self._registry is None:
            return
        if tenant is None:
            raise _nobody()
        if not self._registry.table.require(tenant).hidden_states:
            raise PermissionDeniedError(
                f"wants_hidden_states: tenant {tenant} has no right to hidden states and the output head; ask for "
                "candidates or top-k"
            )

    def check_queued(self, tenant: str) -> None:
        """Raises PermissionDeniedError for a tenant that the file does not name; Redis vouched for the name."""
        if self._registry is not None:
            self._registry.table.require(tenant)


def _nobody() -> UnauthenticatedError:
    return UnauthenticatedError(NO_TOKEN)
