"""A pool's scripts under test: calls them with short defaults and looks at the keys they leave."""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
from redis import Redis

from opd.queue.connection import QueueConnection
from opd.queue.keys import GROUP, PoolKeys, slot

INCARNATION = "00000000000000aa"


class ScriptBench:
    """One pool, seen from both sides: scripts as the services call them, keys as they are."""

    def __init__(self, connection: QueueConnection, redis: "Redis[bytes]") -> None:
        self.keys = PoolKeys("qwen")
        self.redis: Any = redis
        self._connection = connection

    def beat(self, tenant: str = "math", incarnation: str = INCARNATION) -> None:
        self.redis.set(self.keys.alive(tenant, incarnation), "1", px=60_000)

    async def submit(
        self,
        rollout_id: str,
        *,
        tenant: str = "math",
        tokens: int = 100,
        timeout_ms: int = 60_000,
        body: bytes = b"body",
        incarnation: str = INCARNATION,
        attempt: int = 0,
        prompt: str = "",
        fraction: float = 0.7,
    ) -> tuple[str, str, str]:
        numbers = (tokens, timeout_ms, attempt, prompt, body, timeout_ms + 60_000, fraction)
        answer = await self.run("submit", tenant, incarnation, rollout_id, *numbers)
        state, first, second = (part.decode() for part in answer)
        return state, first, second

    async def take(
        self,
        consumer: str = "one",
        *,
        budget: int = 1000,
        max_entries: int = 64,
        lease_ms: int = 60_000,
        max_deliveries: int = 3,
        held: int = 0,
        quantum: int = 100,
        spent: dict[str, int] | None = None,
    ) -> list[dict[str, Any]]:
        self.must_drain = False
        numbers = (budget, max_entries, lease_ms, max_deliveries, held, quantum, 60_000)
        charges = [part for charge in (spent or {}).items() for part in charge]
        rows, drain, is_charged = await self.run("take", consumer, *numbers, *charges)
        self.must_drain, self.is_charged = bool(drain), bool(is_charged)
        names = ("tenant", "id", "rollout_id", "incarnation", "tokens", "count", "age_ms", "remaining_ms", "attempt")
        return [
            {
                name: value.decode() if isinstance(value, bytes) else value
                for name, value in zip(names, row, strict=True)
            }
            for row in rows
        ]

    async def complete(
        self, item: dict[str, Any], consumer: str = "one", *, status: str = "ok", frame: bytes = b"ok\n\nreply"
    ) -> str:
        identity = (item["tenant"], item["id"], item["incarnation"], item["rollout_id"])
        answer: bytes = await self.run("complete", consumer, *identity, status, frame, 60_000)
        return answer.decode()

    async def probe(self, *rollout_ids: str, tenant: str = "math") -> list[str]:
        return [state.decode() for state in await self.run("probe", tenant, INCARNATION, *rollout_ids)]

    async def withdraw(self, *rollout_ids: str, tenant: str = "math") -> int:
        removed: int = await self.run("withdraw", tenant, INCARNATION, *rollout_ids)
        return removed

    async def renew(self, items: Sequence[dict[str, Any]], consumer: str = "one") -> list[int]:
        pairs = [part for item in items for part in (item["tenant"], item["id"])]
        flags: list[int] = await self.run("renew", consumer, *pairs)
        return flags

    async def hand_back(self, items: Sequence[dict[str, Any]], consumer: str = "one") -> int:
        pairs = [part for item in items for part in (item["tenant"], item["id"])]
        returned: int = await self.run("hand_back", consumer, *pairs)
        return returned

    async def run(self, name: str, *args: Any) -> Any:
        return await self._connection.script(name, self.keys.active, self.keys.prefix, *args)

    def names(self) -> set[str]:
        """All keys without the pool's prefix."""
        return {key.decode().removeprefix(self.keys.prefix) for key in self.redis.keys("*")}

    def in_flight(self, tenant: str = "math") -> dict[str, int]:
        return {name.decode(): int(value) for name, value in self.redis.hgetall(self.keys.inflight(tenant)).items()}

    def totals(self) -> dict[str, int]:
        return {name.decode(): int(value) for name, value in self.redis.hgetall(self.keys.counters).items()}

    def reply(self, rollout_id: str, tenant: str = "math") -> bytes | None:
        value: bytes | None = self.redis.get(self.keys.reply(tenant, INCARNATION, rollout_id))
        return value

    def announced(self, tenant: str = "math", incarnation: str = INCARNATION) -> list[tuple[str, str]]:
        rows = self.redis.xrange(self.keys.replies(tenant, incarnation))
        return [(fields[b"r"].decode(), fields[b"s"].decode()) for _, fields in rows]

    def entry(self, rollout_id: str, tenant: str = "math") -> str | None:
        value = self.redis.hget(self.keys.entry(tenant), slot(INCARNATION, rollout_id))
        return value.decode() if value else None

    def num_pending(self, tenant: str = "math") -> int:
        count: int = self.redis.xpending(self.keys.requests(tenant), GROUP)["pending"]
        return count

    def lapse(self, tenant: str = "math") -> None:
        """Lets every lease of a tenant look an hour old, delivery counts unchanged."""
        stream = self.keys.requests(tenant)
        for record in self.redis.xpending_range(stream, GROUP, "-", "+", 1000):
            self.redis.xclaim(stream, GROUP, record["consumer"], 0, [record["message_id"]], idle=3_600_000, justid=True)


@pytest.fixture
def raw_redis(redis_url: str) -> Iterator["Redis[bytes]"]:
    with Redis.from_url(redis_url) as redis:
        yield redis


@pytest.fixture
async def bench(redis_url: str, raw_redis: "Redis[bytes]") -> AsyncIterator[ScriptBench]:
    connection = QueueConnection(redis_url, patience_s=2.0)
    await connection.open()
    found = ScriptBench(connection, raw_redis)
    found.beat()
    yield found
    await connection.close()
