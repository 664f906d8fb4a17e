"""Every Redis key of the system, and the names that may stand in one.

All keys of a pool share the hash tag `{pool}`, so a pool lives on one shard and a script may touch all of it. Keys of
a tenant end in its name (and an incarnation: one life of one trainer process), so access rules can be written per
tenant. Rollouts are filed under their incarnation: a trainer that starts again under the same run name never reads
replies to what its former self had sampled. The Lua scripts build the same names from the same parts.
"""

import re
from dataclasses import dataclass

from opd.errors import InvalidRequestError

GROUP = "pool"
"""The one consumer group of every request stream."""

SHARED_NAMES = frozenset({"active", "newcomers", "wake"})
"""Pool-wide keys that tenants write."""
POOL_NAMES = frozenset({"counters", "deficits", "drain", "dead_tenants", "info", "limits", "replicas", "ring"})
"""Pool-wide keys that only the pool writes; `replica:<id>` is the ninth."""
TENANT_NAMES = frozenset({"alive", "body", "dead", "entry", "inflight", "replies", "reply", "requests"})
"""Keys that end in a tenant's name and belong to it."""

_TENANT = re.compile(r"[a-z0-9-]{1,63}")
_POOL = re.compile(r"[a-z0-9-]{1,63}(@[0-9a-f]{1,64})?")
_ROLLOUT = re.compile(r"[!-~]{1,200}")


def check_tenant(tenant: str) -> str:
    """Returns the name; InvalidRequestError when it could not stand in a key."""
    if not _TENANT.fullmatch(tenant):
        raise InvalidRequestError(f"tenant={tenant!r}: must match [a-z0-9-]{{1,63}}; rename it")
    return tenant


def check_pool(pool: str) -> str:
    """Returns `name` or `name@fingerprint`; InvalidRequestError when it could not stand in a key."""
    if not _POOL.fullmatch(pool):
        raise InvalidRequestError(f"teacher={pool!r}: must match [a-z0-9-]{{1,63}}, with @fingerprint at most")
    return pool


def check_rollout_id(rollout_id: str) -> str:
    """Returns the id; InvalidRequestError when it could not stand in a key."""
    if not _ROLLOUT.fullmatch(rollout_id):
        raise InvalidRequestError(
            f"rollout_id={rollout_id[:80]!r}: must be 1 to 200 printable ASCII characters without spaces"
        )
    return rollout_id


def alias_key(name: str) -> str:
    """Says which pool (`name@fingerprint`) serves under a teacher's bare name; see `opd.queue.pools`."""
    return f"opd:alias:{check_pool(name)}"


@dataclass(frozen=True, slots=True)
class PoolKeys:
    """The keys of one pool.

    Example: `PoolKeys("qwen").requests("math")` is `opd:{qwen}:requests:math`.
    """

    pool: str

    @property
    def prefix(self) -> str:
        return f"opd:{{{self.pool}}}:"

    def _key(self, *parts: str) -> str:
        return self.prefix + ":".join(parts)

    @property
    def active(self) -> str:
        """Set of tenants with entries."""
        return self._key("active")

    @property
    def wake(self) -> str:
        """Short list that waiting replicas block on."""
        return self._key("wake")

    @property
    def newcomers(self) -> str:
        """Short list that full replicas block on: a tenant came that had nothing here."""
        return self._key("newcomers")

    @property
    def limits(self) -> str:
        """Hash: `weight:<tenant>`, `cap:<tenant>`, `cap:*` (tokens in flight)."""
        return self._key("limits")

    @property
    def deficits(self) -> str:
        """Hash: what each waiting tenant may still take in its round."""
        return self._key("deficits")

    @property
    def ring(self) -> str:
        """Hash: whose turn it is, and whether this round's quantum was granted."""
        return self._key("ring")

    @property
    def drain(self) -> str:
        """The replica that runs empty so that a suspect can be scored alone."""
        return self._key("drain")

    @property
    def counters(self) -> str:
        """Hash of totals since the pool began."""
        return self._key("counters")

    @property
    def dead_tenants(self) -> str:
        """Set of tenants with dead letters."""
        return self._key("dead_tenants")

    @property
    def info(self) -> str:
        """The pool's handshake, kept while no replica runs."""
        return self._key("info")

    @property
    def replicas(self) -> str:
        """Set of replica ids; one is alive while `replica:<id>` is."""
        return self._key("replicas")

    def replica(self, replica_id: str) -> str:
        """What a live replica says of itself, with expiry."""
        return self._key("replica", replica_id)

    def requests(self, tenant: str) -> str:
        """Stream of entries: r rollout id, t tokens, i incarnation, d timeout, a attempt, p prompt hash, k requeued."""
        return self._key("requests", tenant)

    def entry(self, tenant: str) -> str:
        """Hash `<incarnation>/<rollout_id>` -> `<entry id> <tokens>`: what makes submit idempotent."""
        return self._key("entry", tenant)

    def inflight(self, tenant: str) -> str:
        """Hash: `tokens` and `entries` admitted and not yet answered."""
        return self._key("inflight", tenant)

    def dead(self, tenant: str) -> str:
        """Stream of dead letters: an entry's fields, n deliveries, c last replica, e entry id."""
        return self._key("dead", tenant)

    def body(self, tenant: str, incarnation: str, rollout_id: str) -> str:
        """The request, with expiry."""
        return self._key("body", tenant, incarnation, rollout_id)

    def reply(self, tenant: str, incarnation: str, rollout_id: str) -> str:
        """The answer's frame, with expiry."""
        return self._key("reply", tenant, incarnation, rollout_id)

    def replies(self, tenant: str, incarnation: str) -> str:
        """Stream of announcements to one trainer process: r rollout id, s `ok` or an error code."""
        return self._key("replies", tenant, incarnation)

    def alive(self, tenant: str, incarnation: str) -> str:
        """Heartbeat of one trainer process, with expiry."""
        return self._key("alive", tenant, incarnation)


def slot(incarnation: str, rollout_id: str) -> str:
    """The field under which `entry` files a rollout."""
    return f"{incarnation}/{rollout_id}"
