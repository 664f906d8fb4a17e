"""The queue shell: lease requests ahead of need, score them through TeacherScoring, answer each exactly once.

Holds one batch being scored and one ready, so that the engine never waits for Redis and a dead replica never holds
much. A full replica still takes a newcomer's first request: its turn comes with the next batch, not the one after.
Leases are renewed only while the engine gets on; whatever this replica cannot score it hands back uncounted. A lost
Redis ends nothing: operations wait for it, readiness says so, and work goes on when it is back.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from opd.credentials import Credentials
from opd.errors import InvalidRequestError, OpdError, QueueUnavailableError, TeacherUnavailableError
from opd.metrics import TeacherMetrics
from opd.queue.connection import QueueConnection
from opd.queue.score_consumer import Delivery, LeaseRules, ScoreConsumer
from opd.settings import read_secret
from opd.types import ScoreRequest
from opd.wire.messages import check_message_size, decode_request, encode_info, encode_reply
from services.teacher_server.batcher import Intake
from services.teacher_server.config import TeacherConfig
from services.teacher_server.gate import Gate
from services.teacher_server.readiness import Part, Readiness
from services.teacher_server.scoring import TeacherScoring
from services.teacher_server.serving import Serving, serving
from services.teacher_server.tenants import TenantTable

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_TAKE_WAIT_S = 1.0
_RENEWALS_A_LEASE = 3
_MISSED_ANNOUNCEMENTS = 2
_PAUSE_AFTER_FAULT_S = 1.0
# A replica with room has the first go at a newcomer.
_COURTESY_S = 0.005
_MAX_NEWCOMERS = 16


def connect_queue(config: TeacherConfig) -> QueueConnection | None:
    """Not opened yet, None where no queue is given; ConfigError for what cannot be, before a model is loaded."""
    url = config.redis_url or read_secret("OPD_REDIS_URL")
    if url is None:
        return None
    queue = config.queue
    credentials = Credentials(
        token=read_secret("OPD_REDIS_PASSWORD"),
        user=queue.user,
        ca_file=queue.ca_file,
        cert_file=queue.cert_file,
        key_file=queue.key_file,
        trust_network=config.trust_network,
    )
    return QueueConnection(url, patience_s=queue.patience_s, credentials=credentials)


class QueueIntake:
    """One replica's hand in the queue. `start`, `run` until cancelled, `stop`, which closes the connection."""

    def __init__(
        self,
        config: TeacherConfig,
        connection: QueueConnection,
        scoring: TeacherScoring,
        *,
        readiness: Readiness,
        metrics: TeacherMetrics,
        replica: str,
        gate: Gate | None = None,
    ) -> None:
        info, queue = scoring.info(), config.queue
        self._scoring = scoring
        self._readiness = readiness
        self._metrics = metrics
        self._settings = queue
        self._gate = gate or Gate()
        self._table: TenantTable | None = None
        self._has_new_limits = asyncio.Event()
        self._stall_s = config.stall_s
        self._batch_tokens = config.batching.max_batch_tokens
        self._info = encode_info(info)
        self._max_message_bytes = info.max_message_bytes
        rules = LeaseRules(
            lease_ms=int(1000 * queue.lease_s),
            max_deliveries=queue.max_deliveries,
            quantum_tokens=config.batching.quantum_tokens,
            max_body_bytes=config.grpc.max_message_bytes,
        )
        self.pool = f"{info.teacher}@{info.fingerprint}" if queue.per_fingerprint else info.teacher
        self._connection = connection
        self._consumer = ScoreConsumer(
            self._connection, pool=self.pool, name=replica, rules=rules, on_refusal=self._note_refusal
        )
        self._serving: dict[Delivery, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        # A suspect is delivered only to a replica that holds nothing, so takes must not overlap.
        self._taking = asyncio.Lock()
        self.num_handed_back = 0

    @property
    def label(self) -> str:
        """The Redis in use, without its password."""
        return self._connection.label

    async def start(self) -> None:
        """Checks Redis and signs on; raises what a user can mend in one line."""
        self._readiness.hold(Part.QUEUE, f"not yet signed on at {self.label}")
        try:
            await self._sign_on()
        except BaseException:
            await self._connection.close()
            raise
        self._readiness.clear(Part.QUEUE)

    async def run(self) -> None:
        """Takes, renews and announces for ever; an exception here ends the process."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_taking())
            group.create_task(self._keep_taking_newcomers())
            group.create_task(self._keep_renewing())
            group.create_task(self._keep_announcing())
            group.create_task(self._keep_limits())

    async def stop(self, patience_s: float) -> bool:
        """Hands back what the engine has not begun, waits for the rest, signs off; True when nothing was cut short.

        To be called when `run` has been cancelled.
        """
        self._scoring.release_waiting(Intake.QUEUE, "it is shutting down")
        tasks = set(self._serving.values())
        pending = (await asyncio.wait(tasks, timeout=patience_s))[1] if tasks else set()
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        self.num_handed_back += len(self._consumer.held)
        try:
            async with asyncio.timeout(max(patience_s, 1.0)):
                await self._consumer.close()
        except (OpdError, TimeoutError) as error:
            _log.warning("redis %s: not signed off (%s); the leases run out by themselves", self.label, error)
        return not pending

    async def _keep_taking(self) -> None:
        while True:
            await self._readiness.wait_until_scoring()
            if self._is_full:
                self._changed.clear()
                await self._changed.wait()
                continue
            async with self._taking:
                # A newcomer may have filled the room meanwhile.
                if not self._is_full:
                    await self._take(self._room_tokens, wait_s=_TAKE_WAIT_S)

    async def _keep_taking_newcomers(self) -> None:
        while True:
            await self._readiness.wait_until_scoring()
            if not await self._outlasting(self._consumer.wait_for_newcomer(_TAKE_WAIT_S)):
                continue
            await asyncio.sleep(_COURTESY_S)
            if self._is_full and self._room_tokens > -self._batch_tokens:
                async with self._taking:
                    await self._take(0, wait_s=0.0, max_entries=_MAX_NEWCOMERS)

    async def _take(self, token_budget: int, **options: Any) -> None:
        taking = self._consumer.take(
            token_budget=token_budget, spent_directly=self._scoring.collect_direct_tokens(), **options
        )
        for delivery in await self._outlasting(taking) or ():
            task = asyncio.create_task(self._serve(delivery))
            self._serving[delivery] = task
            task.add_done_callback(partial(self._forget, delivery))

    @property
    def _room_tokens(self) -> int:
        held = sum(delivery.num_tokens for delivery in self._serving)
        return int(self._settings.batches_ahead * self._batch_tokens) - held

    @property
    def _is_full(self) -> bool:
        return bool(self._serving) and self._room_tokens < self._batch_tokens

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_s / _RENEWALS_A_LEASE)
            if self._scoring.stalled_s > self._stall_s:
                _log.error("the engine stands still for %.0f s; its leases are let go", self._scoring.stalled_s)
                continue
            for delivery in await self._outlasting(self._consumer.renew(list(self._serving))) or ():
                # Somebody else has it now: scoring it here too would be for nothing.
                if task := self._serving.get(delivery):
                    task.cancel()

    async def _keep_announcing(self) -> None:
        every_s = self._settings.announce_s
        while True:
            await asyncio.sleep(every_s)
            try:
                async with asyncio.timeout(_MISSED_ANNOUNCEMENTS * every_s):
                    await self._announce()
            except (OpdError, TimeoutError) as error:
                reason = str(error) or f"no answer for {_MISSED_ANNOUNCEMENTS * every_s:g} s"
                _log.warning("redis %s: %s", self.label, reason)
                self._readiness.hold(Part.QUEUE, f"redis {self.label}: {reason}")
            else:
                self._readiness.clear(Part.QUEUE)

    async def _sign_on(self) -> None:
        await self._connection.open()
        await self._announce()

    def follow(self, table: TenantTable) -> None:
        """The pool's limits are to be these tenants'; written at the start and whenever they change."""
        self._table = table
        self._has_new_limits.set()

    async def _keep_limits(self) -> None:
        while True:
            await self._has_new_limits.wait()
            try:
                await self._write_limits()
            except OpdError as error:
                _log.warning("redis %s: limits not written, trying again (%s)", self.label, error.message)
                await asyncio.sleep(_PAUSE_AFTER_FAULT_S)

    async def _write_limits(self) -> None:
        if (table := self._table) is None:
            return
        await self._consumer.set_limits(weights=table.weights(), caps=table.caps())
        if self._table is table:
            self._has_new_limits.clear()

    async def _announce(self) -> None:
        """Limits and handshake are written each time: a Redis that lost everything gets them back."""
        await self._write_limits()
        await self._consumer.publish_info(self._info)
        if self._readiness.why_not_scoring():
            return
        await self._consumer.announce(self._info, expiry_s=(_MISSED_ANNOUNCEMENTS + 2) * self._settings.announce_s)

    async def _serve(self, delivery: Delivery) -> None:
        """From lease to answer; an answer that Redis cannot take is dropped with its lease."""
        with self._watched(delivery) as served:
            answer = await self._answer(delivery, served)
            try:
                await self._settle(delivery, answer, served)
            except OpdError as error:
                served.span.end(error)
                _log.warning("rollout %s: its answer is lost (%s)", delivery.rollout_id, error.message)

    @contextmanager
    def _watched(self, delivery: Delivery) -> Iterator[Serving]:
        request_id, age_s = f"{delivery.entry_id}/{delivery.delivery_count}", delivery.age_ms / 1000
        with serving(self._metrics, "delivery", request_id=request_id, age_s=age_s) as served:
            served.about(rollout_id=delivery.rollout_id, tenant=delivery.tenant)
            yield served

    def _note_refusal(self, delivery: Delivery, error: OpdError) -> None:
        with self._watched(delivery) as served:
            served.refused(error)

    async def _settle(self, delivery: Delivery, answer: bytes | OpdError, served: Serving) -> None:
        if isinstance(answer, TeacherUnavailableError):
            num_returned = await self._consumer.hand_back([delivery])
            # Added in a step of its own: others hand back while this one waits for Redis.
            self.num_handed_back += num_returned
            if num_returned:
                served.handed_back(answer)
            else:
                served.lost(answer)
        elif isinstance(answer, OpdError):
            # What somebody else has answered by now is not counted twice in a pool.
            if await self._consumer.fail(delivery, answer):
                served.refused(answer)
            else:
                served.lost(answer)
        else:
            with served.span.child("reply"):
                await self._consumer.complete(delivery, answer)

    async def _answer(self, delivery: Delivery, served: Serving) -> bytes | OpdError:
        try:
            request = decode_request(delivery.body, self._scoring.info())
            _check_declared(delivery, request)
            self._gate.check_queued(delivery.tenant)
            reply = await self._scoring.score(
                served.opened(request),
                intake=Intake.QUEUE,
                alone=delivery.delivery_count > 1,
                age_s=delivery.age_ms / 1000,
                patience_s=delivery.remaining_ms / 1000,
            )
            body = encode_reply(reply, request)
            check_message_size(request.rollout_id, len(body), self._max_message_bytes)
            served.scored(reply)
            return body
        except OpdError as error:
            return error
        except Exception:
            return served.failed()

    async def _outlasting(self, operation: Coroutine[Any, Any, _T]) -> _T | None:
        """The result, or None after a fault of Redis that was logged and waited out for a moment."""
        try:
            return await operation
        except OpdError as error:
            self._readiness.hold(Part.QUEUE, error.message)
            level = logging.WARNING if isinstance(error, QueueUnavailableError) else logging.ERROR
            _log.log(level, "the queue fails: %s", error.message)
            await asyncio.sleep(_PAUSE_AFTER_FAULT_S)
            return None

    def _forget(self, delivery: Delivery, _: "asyncio.Task[None]") -> None:
        del self._serving[delivery]
        self._changed.set()


def _check_declared(delivery: Delivery, request: ScoreRequest) -> None:
    """What was declared outside the body decided about shares and rights, so the body must say the same."""
    for name in ("rollout_id", "tenant", "num_tokens"):
        declared, found = getattr(delivery, name), getattr(request, name)
        if declared != found:
            raise InvalidRequestError(
                f"{name}={declared!r}: was declared, the body says {found!r}; send the same in both"
            )
