"""Who is scored next: one ledger and one fair order for all intakes.

Tenants take turns by deficit round robin over tokens: each turn grants a tenant a quantum times its weight, unused
grants are kept while it has work, so shares are by tokens however requests are sized. A batch is closed when the next
request in order does not fit; nothing overtakes it, so a large request cannot starve. Requests marked `alone` have a
batch of their own. The ledger holds every admitted token until its ticket is settled, whether it waits or is being
scored; what would exceed it is refused with a delay. Plain synchronous code without clocks or locks: it is called from
the event loop only, and time is an argument.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from opd.errors import OverCapacityError
from opd.types import ScoreRequest

_MIN_RETRY_S = 0.05
_MAX_RETRY_S = 30.0
# Without a queue nobody collects what direct callers were dealt, and callers choose their names.
_MAX_CHARGED_TENANTS = 1000


class Intake(StrEnum):
    """Where a request came from. The queue admits by its own cap before we see a request; direct callers do not."""

    DIRECT = "direct"
    QUEUE = "queue"


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLimits:
    """Bounds of a batch and of the ledger; tokens are prompt plus response."""

    max_batch_tokens: int = 16_384
    max_batch_requests: int = 256
    max_direct_tokens: int = 131_072
    """Of all direct callers together, waiting or being scored."""
    max_tenant_tokens: int = 65_536
    """Of one tenant's direct requests."""
    quantum_tokens: int = 1_024
    """What a tenant of weight 1 is granted in a turn."""


@dataclass(eq=False, kw_only=True, slots=True)
class Ticket:
    """One admitted request, from `admit` to `settle`."""

    request: ScoreRequest
    intake: Intake
    alone: bool
    admitted_at_s: float
    deadline_s: float
    """On the clock of `admitted_at_s`."""
    entered_at_s: float = 0.0
    """When it came here, which for a queued request is later than its admission."""
    log_fields: Mapping[str, object] = field(default_factory=dict)
    """What log lines about it name, in whichever thread they are written."""
    is_dealt: bool = False
    """Handed out in a batch."""
    is_scored: bool = False
    """Its batch is done; whoever asked may still be reading."""
    is_settled: bool = False
    """Answered or given up; out of the ledger."""

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def num_tokens(self) -> int:
        return self.request.num_tokens


@dataclass(slots=True)
class _Lane:
    """A tenant's waiting tickets and its unused grant."""

    waiting: deque[Ticket]
    deficit_tokens: float = 0.0


class FairBatcher:
    """Admits tickets and deals them out in batches."""

    def __init__(self, limits: BatchLimits, weights: Mapping[str, float] | None = None) -> None:
        self.limits = limits
        self._weights = dict(weights or {})
        self._caps: dict[str, int] = {}
        self._lanes: dict[str, _Lane] = {}
        # Whose turn it is stands in front; whether the front was already granted its quantum is remembered.
        self._ring: deque[str] = deque()
        self._is_front_granted = False
        self._held_tokens: dict[tuple[Intake, str], int] = {}
        self._direct_tokens: dict[str, int] = {}
        self._num_waiting = 0
        self._tokens_per_s = 0.0

    def set_shares(self, weights: Mapping[str, float], caps: Mapping[str, int]) -> None:
        """From the next turn on: weights, 1 where absent, and direct caps, `max_tenant_tokens` where absent."""
        self._weights, self._caps = dict(weights), dict(caps)

    @property
    def num_waiting(self) -> int:
        """Tickets not yet in a batch, cancelled ones not counted."""
        return self._num_waiting

    def held_tokens(self, intake: Intake | None = None, tenant: str | None = None) -> int:
        """Tokens in the ledger, waiting or being scored."""
        return sum(
            tokens
            for (found_intake, found_tenant), tokens in self._held_tokens.items()
            if intake in (None, found_intake) and tenant in (None, found_tenant)
        )

    def admit(self, request: ScoreRequest, *, intake: Intake, alone: bool, now_s: float, deadline_s: float) -> Ticket:
        """Enters a request into the ledger and its tenant's lane; raises OverCapacityError with a delay."""
        if intake is Intake.DIRECT:
            self._check_capacity(request)
        ticket = Ticket(request=request, intake=intake, alone=alone, admitted_at_s=now_s, deadline_s=deadline_s)
        key = (intake, request.tenant)
        self._held_tokens[key] = self._held_tokens.get(key, 0) + request.num_tokens
        if request.tenant not in self._lanes:
            self._lanes[request.tenant] = _Lane(deque())
            self._ring.append(request.tenant)
        self._lanes[request.tenant].waiting.append(ticket)
        self._num_waiting += 1
        return ticket

    def settle(self, ticket: Ticket) -> None:
        """Takes a ticket out of the ledger, answered or given up; a repeat is a no-op."""
        if ticket.is_settled:
            return
        ticket.is_settled = True
        key = (ticket.intake, ticket.tenant)
        self._held_tokens[key] -= ticket.num_tokens
        if not self._held_tokens[key]:
            del self._held_tokens[key]
        self._num_waiting -= not ticket.is_dealt

    def next_batch(self) -> list[Ticket]:
        """The next tickets in order, empty when nothing waits."""
        batch: list[Ticket] = []
        room = self.limits.max_batch_tokens
        while self._ring and len(batch) < self.limits.max_batch_requests:
            lane = self._front()
            if lane is None:
                continue
            ticket = lane.waiting[0]
            if ticket.num_tokens > lane.deficit_tokens:
                self._pass_turn()
                continue
            if batch and (ticket.num_tokens > room or ticket.alone):
                break
            lane.deficit_tokens -= ticket.num_tokens
            lane.waiting.popleft()
            if not lane.waiting:
                self._retire_front()
            room -= ticket.num_tokens
            ticket.is_dealt = True
            if ticket.intake is Intake.DIRECT and (
                ticket.tenant in self._direct_tokens or len(self._direct_tokens) < _MAX_CHARGED_TENANTS
            ):
                self._direct_tokens[ticket.tenant] = self._direct_tokens.get(ticket.tenant, 0) + ticket.num_tokens
            batch.append(ticket)
            if ticket.alone:
                break
        self._num_waiting -= len(batch)
        return batch

    def collect_direct_tokens(self) -> dict[str, int]:
        """Tokens by tenant that were dealt to direct callers since the last call."""
        found, self._direct_tokens = self._direct_tokens, {}
        return found

    def record_speed(self, num_tokens: int, duration_s: float) -> None:
        """Learns how fast the engine is, for the delays told to refused callers."""
        speed = num_tokens / max(duration_s, 1e-6)
        self._tokens_per_s = speed if not self._tokens_per_s else 0.8 * self._tokens_per_s + 0.2 * speed

    def retry_after_s(self) -> float:
        """When about half of what is held will be done."""
        if not self._tokens_per_s:
            return 1.0
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, 0.5 * self.held_tokens() / self._tokens_per_s))

    def _front(self) -> _Lane | None:
        """The lane whose turn it is, granted; None when it had only given-up tickets and was removed."""
        tenant = self._ring[0]
        lane = self._lanes[tenant]
        while lane.waiting and lane.waiting[0].is_settled:
            lane.waiting.popleft()
        if not lane.waiting:
            self._retire_front()
            return None
        if not self._is_front_granted:
            lane.deficit_tokens += self.limits.quantum_tokens * self._weights.get(tenant, 1.0)
            self._is_front_granted = True
        return lane

    def _retire_front(self) -> None:
        """A tenant without work keeps no grant: credit is for those who wait."""
        del self._lanes[self._ring.popleft()]
        self._is_front_granted = False

    def _pass_turn(self) -> None:
        self._ring.rotate(-1)
        self._is_front_granted = False

    def _check_capacity(self, request: ScoreRequest) -> None:
        tenant_cap = self._caps.get(request.tenant, self.limits.max_tenant_tokens)
        caps = (
            (f"tenant {request.tenant}", tenant_cap, request.tenant),
            ("this replica's direct callers", self.limits.max_direct_tokens, None),
        )
        for who, cap, tenant in caps:
            held = self.held_tokens(Intake.DIRECT, tenant)
            # A request larger than the cap is still scored, by itself.
            if held and held + request.num_tokens > cap:
                delay_s = self.retry_after_s()
                raise OverCapacityError(
                    f"num_tokens={request.num_tokens}: {who} already hold {held} of {cap} in-flight tokens; "
                    f"come back in {delay_s:.2f} s or send fewer at once",
                    retry_after_s=delay_s,
                )
