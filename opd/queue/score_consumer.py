"""A replica's side of the queue: lease requests, answer them, or give them back.

What is taken is leased, not owned: it must be renewed while the engine works, and comes to another replica when the
lease runs out. Nothing is lost by a cancelled `take`: what it had leased is handed back. A request that lost its
replica before is delivered alone, and nothing else is taken until it is answered.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from opd.errors import InvalidRequestError, LostRequestError, OpdError
from opd.queue.connection import QueueConnection
from opd.queue.frames import OK, error_frame, ok_frame
from opd.queue.keys import PoolKeys, check_pool
from opd.queue.pools import announce_replica, publish_info, retract_replica, set_limits

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRules:
    """How a pool leases; all its replicas must agree."""

    lease_ms: int = 30_000
    """How long a delivered request stays with a replica that says nothing."""
    max_deliveries: int = 3
    """After so many deliveries without an answer a request is put aside as a dead letter."""
    quantum_tokens: int = 1024
    """What a tenant of weight 1 may take in one round."""
    reply_ttl_ms: int = 3_600_000
    max_body_bytes: int = 64 * 2**20
    poll_s: float = 1.0
    """Longest time without a look for lapsed leases; at most 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """One leased request. Example: `Delivery(tenant="math", rollout_id="run7.0.0", ..., body=b"...")`."""

    tenant: str
    rollout_id: str
    incarnation: str
    """Which life of the trainer sent it."""
    entry_id: str
    num_tokens: int
    """As the client declared them; to be counted again after decoding."""
    delivery_count: int
    """1 the first time; above 1 it comes alone and is to be scored alone."""
    age_ms: int
    """Since its admission."""
    remaining_ms: int
    """Until its deadline, when it was leased."""
    attempt: int
    body: bytes


class ScoreConsumer:
    """One replica of a pool. `name` must be unique among replicas, and new for every start of one.

    `on_refusal` is told what was refused here, for the want of a readable body, and so never came out of `take`.
    """

    def __init__(
        self,
        connection: QueueConnection,
        *,
        pool: str,
        name: str,
        rules: LeaseRules | None = None,
        on_refusal: Callable[[Delivery, OpdError], None] | None = None,
    ) -> None:
        self.name = name
        self._on_refusal = on_refusal
        self.rules = rules or LeaseRules()
        self._connection = connection
        self._keys = PoolKeys(check_pool(pool))
        self._held: dict[tuple[str, str], Delivery] = {}
        self._charges: Counter[str] = Counter()
        self._changed = asyncio.Event()

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        pool: str,
        name: str,
        rules: LeaseRules | None = None,
        patience_s: float = 300.0,
        connect_patience_s: float = 5.0,
    ) -> Self:
        """A consumer with a checked connection of its own; raises as `QueueConnection.open` does."""
        consumer = cls(QueueConnection(url, patience_s=patience_s), pool=pool, name=name, rules=rules)
        try:
            await consumer._connection.open(patience_s=connect_patience_s)
        except BaseException:
            await consumer._connection.close()
            raise
        return consumer

    async def close(self) -> None:
        """Hands everything back, signs off and closes the connection."""
        try:
            await self.hand_back(self.held)
            await self.retract()
        finally:
            await self._connection.close()

    @property
    def held(self) -> tuple[Delivery, ...]:
        """What is leased and not yet answered."""
        return tuple(self._held.values())

    async def take(
        self,
        *,
        token_budget: int,
        max_entries: int = 64,
        wait_s: float = 1.0,
        spent_directly: Mapping[str, int] | None = None,
    ) -> list[Delivery]:
        """Leases requests of together at most `token_budget` tokens; a larger one comes alone.

        A budget of 0 brings at most one small request of each tenant of whom nothing is held. Waits up to `wait_s` for
        the first one; an empty list says that there was none. `spent_directly` is what tenants had from this replica
        without the queue since the last take: it counts against their share.
        """
        give_up_at = time.monotonic() + wait_s
        self._charges.update(spent_directly or {})
        while True:
            work = self._take_now(token_budget, max_entries)
            deliveries, must_drain = await _unless_cancelled(work, self._undo)
            remaining_s = give_up_at - time.monotonic()
            if deliveries or remaining_s <= 0:
                return deliveries
            await self._wait(min(remaining_s, self.rules.poll_s, 1.0), must_drain)

    async def wait_for_newcomer(self, timeout_s: float) -> bool:
        """Until a tenant comes that had nothing in the queue; False after `timeout_s`."""
        return bool(await self._connection.call(lambda redis: redis.blpop(self._keys.newcomers, timeout=timeout_s)))

    async def complete(self, delivery: Delivery, reply: bytes) -> bool:
        """Answers a request; False when it was not ours any more, and nothing happened."""
        return await self._settle(delivery, OK, ok_frame(reply))

    async def fail(self, delivery: Delivery, error: OpdError) -> bool:
        """Refuses a request; a retryable error makes the client submit it again."""
        return await self._settle(delivery, error.code, error_frame(error))

    async def renew(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """Prolongs leases and returns those that were lost, which need not be scored any more."""
        wanted = [delivery for delivery in deliveries if self._key_of(delivery) in self._held]
        if not wanted:
            return []
        flags = await self._connection.script("renew", *self._head, *_pairs(wanted))
        lost = [delivery for delivery, is_ours in zip(wanted, flags, strict=True) if not is_ours]
        for delivery in lost:
            self._release(delivery)
        return lost

    async def hand_back(self, deliveries: Iterable[Delivery]) -> int:
        """Gives unfinished requests to whoever takes next, at once and uncounted; returns how many were ours."""
        wanted = list(deliveries)
        if not wanted:
            return 0
        try:
            num_returned: int = await self._connection.script("hand_back", *self._head, *_pairs(wanted))
        except OpdError:
            self._let_lapse(wanted)
            raise
        for delivery in wanted:
            self._release(delivery)
        return num_returned

    async def publish_info(self, info: bytes) -> None:
        """Keeps the pool's handshake in Redis, also for the time when no replica runs."""
        await publish_info(self._connection, self._keys.pool, info)

    async def announce(self, info: bytes, *, expiry_s: float = 15.0) -> None:
        """Says that this replica lives; to be repeated well within the expiry."""
        await announce_replica(self._connection, self._keys.pool, self.name, info, expiry_s=expiry_s)

    async def retract(self) -> None:
        """Says that this replica is gone."""
        await retract_replica(self._connection, self._keys.pool, self.name)

    async def set_limits(
        self, *, weights: Mapping[str, float], caps: Mapping[str, int], default_cap: int | None = None
    ) -> None:
        """Replaces the pool's limits: shares by weight, tokens in flight by cap."""
        await set_limits(self._connection, self._keys.pool, weights=weights, caps=caps, default_cap=default_cap)

    @property
    def _head(self) -> tuple[str, str, str]:
        return self._keys.active, self._keys.prefix, self.name

    async def _take_now(self, token_budget: int, max_entries: int) -> tuple[list[Delivery], bool]:
        if any(delivery.delivery_count > 1 for delivery in self._held.values()):
            return [], True
        rules = self.rules
        numbers = (rules.lease_ms, rules.max_deliveries, len(self._held), rules.quantum_tokens, rules.reply_ttl_ms)
        charges = Counter(self._charges)
        flat = [part for charge in charges.items() for part in charge]
        rows, must_drain, is_charged = await self._connection.script(
            "take", *self._head, token_budget, max_entries, *numbers, *flat
        )
        if is_charged:
            # What was added meanwhile is charged the next time; a take that failed or had other cares charged nothing.
            self._charges -= charges
        bare = [_read_row(row) for row in rows]
        for delivery in bare:
            self._held[self._key_of(delivery)] = delivery
        try:
            return await self._with_bodies(bare), bool(must_drain)
        except OpdError:
            self._let_lapse(bare)
            raise

    async def _with_bodies(self, bare: Sequence[Delivery]) -> list[Delivery]:
        """Fetches bodies; a missing or oversized one is refused here and never reaches the engine."""
        keys = [self._keys.body(item.tenant, item.incarnation, item.rollout_id) for item in bare]
        bodies = await self._connection.read_bounded(keys, self.rules.max_body_bytes)
        whole = []
        for item, body in zip(bare, bodies, strict=True):
            if isinstance(body, bytes):
                delivery = replace(item, body=body)
                self._held[self._key_of(item)] = delivery
                whole.append(delivery)
            else:
                error = self._body_error(item, body)
                if await self.fail(item, error) and self._on_refusal is not None:
                    self._on_refusal(item, error)
        return whole

    def _body_error(self, item: Delivery, num_bytes: int | None) -> OpdError:
        if num_bytes is None:
            return LostRequestError(f"rollout_id={item.rollout_id}: its body is gone from the queue; submit it again")
        return InvalidRequestError(
            f"rollout_id={item.rollout_id}: body of {num_bytes} bytes is above the limit of "
            f"{self.rules.max_body_bytes}; ask for fewer candidates or shorten it"
        )

    async def _wait(self, timeout_s: float, must_drain: bool) -> None:
        """Until something may have changed: a wake-up from Redis or, while running empty, an answer of ours."""
        if must_drain and self._held:
            self._changed.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                return
        elif not must_drain:
            await self._connection.call(lambda redis: redis.blpop(self._keys.wake, timeout=max(timeout_s, 0.01)))

    async def _settle(self, delivery: Delivery, status: str, frame: bytes) -> bool:
        identity = (delivery.tenant, delivery.entry_id, delivery.incarnation, delivery.rollout_id)
        try:
            outcome = await self._connection.script(
                "complete", *self._head, *identity, status, frame, self.rules.reply_ttl_ms
            )
        except OpdError:
            self._let_lapse([delivery])
            raise
        self._release(delivery)
        if outcome != b"done":
            _log.info("rollout %s of %s: %s", delivery.rollout_id, delivery.tenant, outcome.decode())
        return bool(outcome == b"done")

    async def _undo(self, result: tuple[list[Delivery], bool]) -> None:
        await self.hand_back(result[0])

    def _let_lapse(self, deliveries: Iterable[Delivery]) -> None:
        """Their leases run out by themselves; keeping them on our books would only bar suspects from us."""
        for delivery in deliveries:
            self._release(delivery)

    def _release(self, delivery: Delivery) -> None:
        self._held.pop(self._key_of(delivery), None)
        self._changed.set()

    @staticmethod
    def _key_of(delivery: Delivery) -> tuple[str, str]:
        return delivery.tenant, delivery.entry_id


async def _unless_cancelled(work: Coroutine[Any, Any, _T], undo: Callable[[_T], Awaitable[None]]) -> _T:
    """Runs `work` to its end even when the caller is cancelled, and then undoes it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with suppress(OpdError):
            await undo(await task)
        raise


def _pairs(deliveries: Iterable[Delivery]) -> list[str]:
    return [part for delivery in deliveries for part in (delivery.tenant, delivery.entry_id)]


def _read_row(row: Sequence[Any]) -> Delivery:
    tenant, entry_id, rollout_id, incarnation, *numbers = row
    num_tokens, delivery_count, age_ms, remaining_ms, attempt = numbers
    return Delivery(
        tenant=tenant.decode(),
        entry_id=entry_id.decode(),
        rollout_id=rollout_id.decode(),
        incarnation=incarnation.decode(),
        num_tokens=num_tokens,
        delivery_count=delivery_count,
        age_ms=age_ms,
        remaining_ms=remaining_ms,
        attempt=attempt,
        body=b"",
    )
