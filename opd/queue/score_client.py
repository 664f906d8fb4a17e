"""A trainer process's side of the queue: submit bodies, wait for replies, lose none and count none twice.

One client is one incarnation: a heartbeat says that somebody waits, and replies are announced on a stream of its own.
Whatever happens to Redis or the replicas, the rule is the same: ask what the queue knows of every rollout that is
still open (`probe`), fetch what is answered, and submit again only what is gone. That question is put after every
loss of the connection, whenever the heartbeat was found missing, and as a sweep in between.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from opd import tracing
from opd.credentials import Credentials
from opd.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    LostRequestError,
    OpdError,
    OverCapacityError,
    QueueUnavailableError,
)
from opd.queue.client_rules import ClientRules, ClientStats
from opd.queue.connection import QueueConnection
from opd.queue.frames import open_frame
from opd.queue.keys import PoolKeys, check_pool, check_rollout_id, check_tenant
from opd.retry import RetryRules

_log = logging.getLogger(__name__)
_COURTESY_S = 2.0
_PACE = RetryRules(total_s=0.0, first_delay_s=0.02, max_delay_s=1.0)


@dataclass(kw_only=True, slots=True, eq=False)
class _Open:
    """A rollout that waits for its reply."""

    rollout_id: str
    num_tokens: int
    timeout_ms: int
    body: bytes
    prompt_hash: str
    traceparent: str
    attempt: int = 0
    may_be_queued: bool = False
    """From the first submission until its outcome is known."""
    is_admitted: bool = False
    """The queue confirmed the submission; only then is a missing entry a lost one."""
    outcome: asyncio.Future[bytes | OpdError] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class QueueScoreClient:
    """Submits opaque bodies to one pool for one tenant. Make it with `connect`, end it with `close`."""

    def __init__(
        self, connection: QueueConnection, *, pool: str, tenant: str, rules: ClientRules | None = None
    ) -> None:
        self.rules = rules or ClientRules()
        self.stats = ClientStats()
        self.incarnation = secrets.token_hex(8)
        self._connection = connection
        self._keys = PoolKeys(check_pool(pool))
        self._tenant = check_tenant(tenant)
        self._open: dict[str, _Open] = {}
        self._admission = asyncio.Lock()
        self._progress = asyncio.Event()
        self._emptied = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._is_doubtful = False
        self._fault: OpdError | None = None
        self._is_closed = False

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        pool: str,
        tenant: str,
        rules: ClientRules | None = None,
        patience_s: float = 300.0,
        connect_patience_s: float = 5.0,
        credentials: Credentials | None = None,
    ) -> Self:
        """A started client with a checked connection of its own; raises as `QueueConnection.open` does."""
        connection = QueueConnection(url, patience_s=patience_s, credentials=credentials)
        client = cls(connection, pool=pool, tenant=tenant, rules=rules)
        try:
            await client._connection.open(patience_s=connect_patience_s)
            await client.start()
        except BaseException:
            await client._connection.close()
            raise
        return client

    @property
    def num_open(self) -> int:
        """Rollouts that wait for admission or a reply."""
        return len(self._open)

    async def start(self) -> None:
        """First heartbeat, then the two background tasks; a fault in either fails every rollout that waits."""
        await self._beat()
        self._is_doubtful = False
        for name, work in (("heartbeat", self._keep_beating()), ("replies", self._keep_reading())):
            task = asyncio.create_task(work, name=f"opd-queue-{name}")
            task.add_done_callback(self._on_task_end)
            self._tasks.append(task)

    async def score(
        self,
        *,
        rollout_id: str,
        num_tokens: int,
        timeout_ms: int,
        body: bytes,
        prompt_hash: str = "",
        traceparent: str = "",
    ) -> bytes:
        """Submits one rollout and returns its reply; those of one prompt hash are scored together where that is fair.

        Raises what the pool refused it with, DeadlineExceededError, OverCapacityError when it was not admitted in
        time, or QueueUnavailableError once Redis was away for longer than the patience. Cancelling withdraws it.
        """
        self._check(rollout_id, body)
        item = _Open(
            rollout_id=rollout_id,
            num_tokens=num_tokens,
            timeout_ms=timeout_ms,
            body=body,
            prompt_hash=prompt_hash,
            traceparent=traceparent,
        )
        self._open[rollout_id] = item
        self.stats.sent += 1
        try:
            return await self._score_until_final(item)
        except OpdError:
            self.stats.failed += 1
            raise
        finally:
            if item.may_be_queued and self._fault is None:
                await self._withdraw([rollout_id])
            del self._open[rollout_id]
            if not self._open:
                self._emptied.set()

    async def close(self) -> None:
        """Withdraws what is open, ends the heartbeat and closes the connection; waiting callers get an error."""
        if self._is_closed:
            return
        self._is_closed = True
        left_over = list(self._open)
        was_faultless = self._fault is None
        self._stop(QueueUnavailableError(f"client of {self._tenant}: was closed while requests waited; keep it open"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            if was_faultless:
                await self._leave(left_over)
        finally:
            await self._connection.close()

    @property
    def _alive(self) -> str:
        return self._keys.alive(self._tenant, self.incarnation)

    @property
    def _replies(self) -> str:
        return self._keys.replies(self._tenant, self.incarnation)

    @property
    def _head(self) -> tuple[str, str, str, str]:
        return self._keys.requests(self._tenant), self._keys.prefix, self._tenant, self.incarnation

    def _check(self, rollout_id: str, body: bytes) -> None:
        if self._fault is not None:
            raise self._fault
        check_rollout_id(rollout_id)
        if rollout_id in self._open:
            raise InvalidRequestError(f"rollout_id={rollout_id}: is being scored already; use each id once")
        if len(body) > self.rules.max_body_bytes:
            raise InvalidRequestError(
                f"rollout_id={rollout_id}: body of {len(body)} bytes is above the limit of "
                f"{self.rules.max_body_bytes}; ask for fewer candidates or shorten it"
            )

    async def _score_until_final(self, item: _Open) -> bytes:
        for delay_s in _PACE.delays():
            with tracing.begin("submit", parent=item.traceparent, attempt=item.attempt, tokens=item.num_tokens):
                await self._admit(item)
            outcome = await self._outcome(item)
            item.may_be_queued = item.is_admitted = False
            if isinstance(outcome, bytes):
                self.stats.scored += 1
                return outcome
            item.attempt += 1
            if self._fault is not None or not outcome.retryable or item.attempt >= self.rules.max_attempts:
                raise outcome
            _log.info("rollout %s: %s; submitting it again", item.rollout_id, outcome)
            self.stats.resubmitted += 1
            item.outcome = asyncio.get_running_loop().create_future()
            await asyncio.sleep(delay_s if outcome.retry_after_s is None else outcome.retry_after_s)
        raise AssertionError("delays() never ends")

    async def _outcome(self, item: _Open) -> bytes | OpdError:
        wait_s = item.timeout_ms / 1000 + self.rules.deadline_grace_s
        try:
            async with asyncio.timeout(wait_s):
                return await item.outcome
        except TimeoutError:
            raise DeadlineExceededError(
                f"rollout_id={item.rollout_id}: no reply within timeout_ms={item.timeout_ms}; "
                "raise it, or see whether the pool has replicas"
            ) from None

    async def _admit(self, item: _Open) -> None:
        """Submits in the order of asking; whoever finds no room keeps the others behind it waiting too."""
        async with self._admission:
            give_up_at = time.monotonic() + self.rules.admission_timeout_s
            for delay_s in _PACE.delays():
                self._progress.clear()
                if self._fault is not None:
                    raise self._fault
                item.may_be_queued = True
                state, first, second = await self._submit(item)
                if state in ("accepted", "pending", "replied"):
                    item.is_admitted = True
                    if state == "replied":
                        self._is_doubtful = True
                    return
                item.may_be_queued = False
                self._refuse_hopeless(item, state, first)
                if time.monotonic() + delay_s > give_up_at:
                    raise OverCapacityError(
                        f"rollout_id={item.rollout_id}: not admitted for {self.rules.admission_timeout_s:g} s "
                        f"({state}: {first} of {second}); raise the tenant's cap or add replicas"
                    )
                await self._pause(delay_s)

    async def _submit(self, item: _Open) -> tuple[str, str, str]:
        body_ttl_ms = item.timeout_ms + self.rules.heartbeat_ms
        entry = (item.rollout_id, item.num_tokens, item.timeout_ms, item.attempt, item.prompt_hash)
        while True:
            answer = await self._connection.script(
                "submit", *self._head, *entry, item.body, body_ttl_ms, self.rules.memory_fraction
            )
            state, first, second = (part.decode() for part in answer)
            if state != "unregistered":
                return state, first, second
            # Redis lost our heartbeat, perhaps everything: the reader finds out once the heartbeat is back.
            await self._beat()

    def _refuse_hopeless(self, item: _Open, state: str, cap: str) -> None:
        if state == "over_cap" and item.num_tokens > float(cap):
            raise InvalidRequestError(
                f"rollout_id={item.rollout_id}: {item.num_tokens} tokens are above the tenant's cap of {cap} "
                "in flight; shorten it or raise the cap"
            )

    async def _pause(self, delay_s: float) -> None:
        """Until a reply has freed room, at most `delay_s`."""
        try:
            async with asyncio.timeout(delay_s):
                await self._progress.wait()
        except TimeoutError:
            return

    async def _beat(self) -> None:
        """Prolongs the heartbeat; one that had to be set anew was lost, and perhaps more was."""
        ttl_ms = self.rules.heartbeat_ms
        if await self._connection.call(lambda redis: redis.pexpire(self._alive, ttl_ms)):
            return
        await self._connection.call(lambda redis: redis.set(self._alive, int(time.time()), px=ttl_ms))
        self._is_doubtful = True

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(self.rules.heartbeat_ms / 4000)
            try:
                await self._beat()
            except OverCapacityError as error:
                _log.warning("heartbeat of %s: %s", self._tenant, error)

    async def _keep_reading(self) -> None:
        """Reads announcements from the start of the stream: whatever was read and handled is deleted from it."""
        swept_at, seen_epoch = time.monotonic(), self._connection.epoch
        while True:
            found = await self._connection.call(lambda redis: redis.xread({self._replies: "0-0"}, count=64, block=500))
            if found:
                await self._handle(found[0][1])
            epoch = self._connection.epoch
            if self._is_doubtful or epoch != seen_epoch or time.monotonic() - swept_at > self.rules.sweep_s:
                self._is_doubtful, seen_epoch, swept_at = False, epoch, time.monotonic()
                await self._reconcile()

    async def _handle(self, announcements: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> None:
        await self._collect(list(dict.fromkeys(fields[b"r"].decode() for _, fields in announcements)))
        entry_ids = [entry_id for entry_id, _ in announcements]
        await self._connection.call(lambda redis: redis.xdel(self._replies, *entry_ids))

    async def _collect(self, rollout_ids: Sequence[str]) -> None:
        """Fetches replies, deletes them, and gives each to whoever waits for it.

        Deleted first: whoever then submits a rollout again must not be answered with what it was refused with before.
        """
        keys = [self._keys.reply(self._tenant, self.incarnation, rollout_id) for rollout_id in rollout_ids]
        frames = await self._connection.read_bounded(keys, self.rules.max_reply_bytes)
        await self._connection.call(lambda redis: redis.delete(*keys))
        for rollout_id, frame in zip(rollout_ids, frames, strict=True):
            item = self._open.get(rollout_id)
            if item is None or item.outcome.done():
                # Without a frame this is only the announcement of a reply that a sweep had found before.
                self.stats.duplicates += frame is not None
            elif frame is not None:
                item.outcome.set_result(self._read(rollout_id, frame))
            else:
                self._is_doubtful = True
        self._progress.set()

    def _read(self, rollout_id: str, frame: bytes | int) -> bytes | OpdError:
        if isinstance(frame, bytes):
            return open_frame(frame)
        limit = self.rules.max_reply_bytes
        return InvalidRequestError(
            f"rollout_id={rollout_id}: reply of {frame} bytes is above the limit of {limit}; ask for less or raise it"
        )

    async def _reconcile(self) -> None:
        """Asks what became of every admitted rollout: answered ones are fetched, lost ones submitted again."""
        waiting = {name: item for name, item in self._open.items() if item.is_admitted and not item.outcome.done()}
        if not waiting:
            return
        states = await self._connection.script("probe", *self._head, *waiting)
        replied = [name for name, state in zip(waiting, states, strict=True) if state == b"replied"]
        if replied:
            await self._collect(replied)
        for (name, item), state in zip(waiting.items(), states, strict=True):
            if state == b"absent" and not item.outcome.done():
                item.outcome.set_result(LostRequestError(f"rollout_id={name}: the queue no longer knows it"))

    async def _withdraw(self, rollout_ids: Sequence[str]) -> None:
        """A courtesy to the pool and the tenant's cap, so it does not wait for a Redis that is away."""
        try:
            async with asyncio.timeout(_COURTESY_S):
                await self._connection.script("withdraw", *self._head, *rollout_ids)
        except (OpdError, TimeoutError) as error:
            _log.info("%d rollouts of %s not withdrawn: %r", len(rollout_ids), self._tenant, error)

    async def _leave(self, left_over: Sequence[str]) -> None:
        """Lets callers that were submitting finish, then removes every trace of this incarnation."""
        try:
            async with asyncio.timeout(_COURTESY_S):
                if self._open:
                    self._emptied.clear()
                    await self._emptied.wait()
                if left_over:
                    await self._connection.script("withdraw", *self._head, *left_over)
                await self._connection.call(lambda redis: redis.delete(self._alive, self._replies))
        except (OpdError, TimeoutError) as error:
            _log.info("client of %s left without signing off: %r", self._tenant, error)

    def _on_task_end(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        fault = error if isinstance(error, OpdError) else InternalError(f"{task.get_name()} ended: {error!r}")
        _log.error("queue client of %s stops: %s", self._tenant, fault)
        self._stop(fault)

    def _stop(self, fault: OpdError) -> None:
        """Fails everybody who waits, now and later."""
        self._fault = self._fault or fault
        self._progress.set()
        for item in self._open.values():
            if not item.outcome.done():
                item.outcome.set_result(self._fault)
