"""The public way to ask a teacher pool, from any trainer, over the queue or gRPC, async or not.

From asyncio::

    async with ScoreClient.connect("redis://localhost:6379/0", teacher="qwen", tenant="math") as client:
        print((await client.info()).fingerprint)
        reply = await client.score(request)
        print(reply.scores.sampled_logprobs)

From a thread, with ordinary futures::

    with SyncScoreClient.connect("grpc://teachers:7000", teacher="qwen", tenant="math") as client:
        futures = [client.submit(request) for request in requests]
        for future in concurrent.futures.as_completed(futures):
            learn(future.result())

The queue is durable and fair and outlives replicas and Redis restarts; gRPC is direct. Retryable errors are tried again
here (over gRPC) or in the queue client, and nowhere above.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from opd import tracing
from opd.credentials import Credentials
from opd.errors import (
    ConfigError,
    InvalidRequestError,
    OpdError,
    QueueUnavailableError,
    TeacherUnavailableError,
    UnsupportedError,
)
from opd.head_cache import DEFAULT_FOLDER, HeadCache
from opd.queue.client_rules import ClientRules, ClientStats
from opd.queue.connection import QueueConnection, hide_password
from opd.queue.pools import read_info, resolve_pool
from opd.queue.score_client import QueueScoreClient
from opd.retry import RetryRules, retry
from opd.types import OutputHeadFile, ScoreReply, ScoreRequest, TeacherInfo
from opd.wire.messages import check_message_size, decode_info, decode_reply, encode_request

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class _Transport(Protocol):
    """What carries requests to one pool."""

    stats: ClientStats

    async def open(self) -> None: ...
    async def score(self, request: ScoreRequest) -> ScoreReply: ...
    async def info(self) -> TeacherInfo: ...
    async def output_head(self, folder: Path) -> OutputHeadFile: ...
    async def close(self) -> None: ...


class ScoreClient:
    """Asks one teacher for one tenant. Requests must name both as the client does."""

    def __init__(self, transport: _Transport, *, teacher: str, tenant: str) -> None:
        self._transport = transport
        self._teacher = teacher
        self._tenant = tenant

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        teacher: str,
        tenant: str,
        patience_s: float = 300.0,
        rules: ClientRules | None = None,
        credentials: Credentials | None = None,
    ) -> Self:
        """A client for `redis://`, `rediss://`, `unix://` (the queue), `grpc://host:port` or, over TLS,
        `grpcs://host:port`, to open by `async with`.

        `patience_s` is how long a lost Redis, or over gRPC a pool that says "later", is borne. The credentials' token
        is sent over gRPC with every call, and to Redis as the password of the tenant's user.
        """
        credentials = credentials or Credentials()
        if url.startswith(("grpc://", "grpcs://")):
            return cls(_GrpcTransport(url, patience_s, credentials), teacher=teacher, tenant=tenant)
        if url.startswith(("redis://", "rediss://", "unix://")):
            queue = _QueueTransport(
                url,
                teacher=teacher,
                tenant=tenant,
                patience_s=patience_s,
                rules=rules,
                credentials=replace(credentials, user=credentials.user or tenant),
            )
            return cls(queue, teacher=teacher, tenant=tenant)
        raise ConfigError(
            f"url={hide_password(url)}: must start with redis://, rediss://, unix://, grpc:// or grpcs://"
        )

    @property
    def stats(self) -> ClientStats:
        """Counts since the client was opened."""
        return self._transport.stats

    async def open(self) -> None:
        """Connects; raises QueueUnavailableError or QueueMisconfiguredError where there is a queue."""
        await self._transport.open()

    async def close(self) -> None:
        """Takes back what is open and disconnects."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def score(self, request: ScoreRequest) -> ScoreReply:
        """One rollout's scores, or the typed error that came instead; cancelling takes the request back."""
        if (request.teacher, request.tenant) != (self._teacher, self._tenant):
            raise InvalidRequestError(
                f"rollout_id={request.rollout_id}: is for teacher {request.teacher} and tenant {request.tenant}, the "
                f"client for {self._teacher} and {self._tenant}; use one client for each pair"
            )
        if not tracing.is_on():
            return await self._transport.score(request)
        parent, asked = request.traceparent or None, request.rollout_id
        with tracing.begin(
            "score", parent=parent, rollout=asked, tenant=request.tenant, teacher=request.teacher
        ) as span:
            return await self._transport.score(replace(request, traceparent=span.traceparent))

    async def info(self) -> TeacherInfo:
        """Who serves under the teacher's name now; TeacherUnavailableError while nobody ever has.

        Over the queue this also follows a moved alias, once no request is open: ask at the start of every step.
        """
        return await self._transport.info()

    async def output_head(self, folder: Path = DEFAULT_FOLDER) -> OutputHeadFile:
        """The teacher's output head, verified, from the cache in `folder` or over gRPC; a cut download goes on.

        Raises UnsupportedError over the queue or where hidden states are not served, PermissionDeniedError without
        the right, and ConfigError when the folder cannot be written.
        """
        return await self._transport.output_head(folder)


class _QueueTransport:
    """Requests as bodies of the queue."""

    def __init__(
        self,
        url: str,
        *,
        teacher: str,
        tenant: str,
        patience_s: float,
        rules: ClientRules | None,
        credentials: Credentials,
    ) -> None:
        self._url = url
        self._teacher = teacher
        self._tenant = tenant
        self._patience_s = patience_s
        self._rules = rules
        self._credentials = credentials
        self._connection = QueueConnection(url, patience_s=patience_s, max_connections=1, credentials=credentials)
        self._pool = ""
        self._client: QueueScoreClient | None = None
        self._max_message_bytes: int | None = None
        self.stats = ClientStats()

    async def open(self) -> None:
        try:
            await self._connection.open()
            await self._move(await resolve_pool(self._connection, self._teacher))
        except BaseException:
            await self.close()
            raise

    async def score(self, request: ScoreRequest) -> ScoreReply:
        if request.wants_hidden_states:
            raise UnsupportedError(
                f"rollout {request.rollout_id}: wants_hidden_states=True, and hidden states never go through the "
                "queue; connect to a grpc:// address of the teacher"
            )
        client, body = self._opened(), encode_request(request)
        check_message_size(request.rollout_id, len(body), await self._message_limit())
        reply = await client.score(
            rollout_id=request.rollout_id,
            num_tokens=request.num_tokens,
            timeout_ms=request.timeout_ms,
            body=body,
            prompt_hash=request.prompt_hash,
            traceparent=request.traceparent,
        )
        return decode_reply(reply, request)

    async def info(self) -> TeacherInfo:
        pool = await resolve_pool(self._connection, self._teacher)
        if pool != self._pool and self._opened().num_open == 0:
            await self._move(pool)
        info = decode_info(await read_info(self._connection, self._pool))
        self._max_message_bytes = info.max_message_bytes
        return info

    async def output_head(self, folder: Path) -> OutputHeadFile:
        raise UnsupportedError("output head: is not in the queue; connect to a grpc:// address of the teacher")

    async def close(self) -> None:
        client, self._client = self._client, None
        try:
            if client is not None:
                await client.close()
        finally:
            await self._connection.close()

    async def _move(self, pool: str) -> None:
        """Serves from `pool` from now on."""
        before = self._client
        client = await QueueScoreClient.connect(
            self._url,
            pool=pool,
            tenant=self._tenant,
            rules=self._rules,
            patience_s=self._patience_s,
            credentials=self._credentials,
        )
        client.stats = self.stats
        self._client, self._pool, self._max_message_bytes = client, pool, None
        if before is not None:
            _log.info("teacher %s is now served by pool %s", self._teacher, pool)
            await before.close()

    async def _message_limit(self) -> int:
        """As the pool publishes it; 0 while no replica ever did, whose own refusal then has to do."""
        if self._max_message_bytes is None:
            try:
                info = decode_info(await read_info(self._connection, self._pool))
            except TeacherUnavailableError:
                return 0
            self._max_message_bytes = info.max_message_bytes
        return self._max_message_bytes

    def _opened(self) -> QueueScoreClient:
        if self._client is None:
            raise QueueUnavailableError(f"teacher={self._teacher}: the client is not open; use `async with` or open()")
        return self._client


class _GrpcTransport:
    """Requests as calls."""

    def __init__(self, url: str, patience_s: float, credentials: Credentials) -> None:
        # Whoever uses the queue alone never loads gRPC.
        from opd.rpc.client import GrpcScoreClient

        self._client = GrpcScoreClient(url, credentials=credentials)
        self._rules = RetryRules(total_s=patience_s)
        self.stats = ClientStats()

    async def open(self) -> None:
        """Nothing to do: a channel connects when it is used."""

    async def score(self, request: ScoreRequest) -> ScoreReply:
        self.stats.sent += 1
        try:
            reply = await self._patiently(lambda: self._client.score(request))
        except OpdError:
            self.stats.failed += 1
            raise
        self.stats.scored += 1
        return reply

    async def info(self) -> TeacherInfo:
        return await self._client.info()

    async def output_head(self, folder: Path) -> OutputHeadFile:
        cache = HeadCache(folder)

        async def fetch() -> OutputHeadFile:
            # Asked again each time: the pool may have moved on to other weights while this one was cut off.
            return await cache.fetch(await self._client.info(), self._client.output_head)

        return await self._patiently(fetch)

    async def close(self) -> None:
        await self._client.close()

    async def _patiently(self, operation: Callable[[], Awaitable[_T]]) -> _T:
        return await retry(operation, rules=self._rules, is_retryable=_is_retryable, on_failure=self._count_retry)

    def _count_retry(self, error: Exception) -> None:
        self.stats.resubmitted += 1


def _is_retryable(error: Exception) -> bool:
    return isinstance(error, OpdError) and error.retryable


class SyncScoreClient:
    """A `ScoreClient` in an event loop and thread of its own; its methods may be called from any other thread."""

    def __init__(self, client: ScoreClient) -> None:
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="opd-score-client", daemon=True)
        self._thread.start()
        self._is_closed = False
        try:
            self._run(client.open()).result()
        except BaseException:
            self._end()
            raise

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        teacher: str,
        tenant: str,
        patience_s: float = 300.0,
        rules: ClientRules | None = None,
        credentials: Credentials | None = None,
    ) -> Self:
        """Connects at once; arguments and errors are those of `ScoreClient`."""
        client = ScoreClient.connect(
            url, teacher=teacher, tenant=tenant, patience_s=patience_s, rules=rules, credentials=credentials
        )
        return cls(client)

    @property
    def stats(self) -> ClientStats:
        """Counts since the start."""
        return self._client.stats

    def submit(self, request: ScoreRequest) -> Future[ScoreReply]:
        """Returns at once; the future ends with the reply or an `OpdError`. Cancelling it takes the request back."""
        return self._run(self._client.score(request))

    def info(self) -> TeacherInfo:
        """As `ScoreClient.info`."""
        return self._run(self._client.info()).result()

    def output_head(self, folder: Path = DEFAULT_FOLDER) -> OutputHeadFile:
        """As `ScoreClient.output_head`."""
        return self._run(self._client.output_head(folder)).result()

    def close(self) -> None:
        """Fails what is open, disconnects and ends the thread; a second call does nothing."""
        if self._is_closed:
            return
        try:
            self._run(self._client.close()).result()
        finally:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        if self._is_closed:
            work.close()
            raise QueueUnavailableError("score client: is closed; make a new one")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _end(self) -> None:
        self._is_closed = True
        asyncio.run_coroutine_threadsafe(_finish_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _finish_tasks() -> None:
    """Ends whatever still runs in this loop, so that no caller waits for ever."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
