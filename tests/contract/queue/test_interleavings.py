"""No interleaving of trainers, replicas, crashes and a Redis that forgets loses a rollout or counts one twice."""

import asyncio
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from opd.queue.connection import QueueConnection
from opd.queue.keys import GROUP, PoolKeys

KEYS = PoolKeys("qwen")
LIFE = "00000000000000aa"
TENANTS = ("code", "math")
REPLICAS = ("one", "two")

actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.sampled_from(TENANTS), st.integers(0, 5), st.sampled_from([1, 40, 90, 300])),
        st.tuples(st.just("take"), st.sampled_from(REPLICAS), st.sampled_from([0, 1, 100, 1000])),
        st.tuples(st.just("complete"), st.sampled_from(REPLICAS), st.integers(0, 3)),
        st.tuples(st.just("complete_twice"), st.sampled_from(REPLICAS)),
        st.tuples(st.just("crash"), st.sampled_from(REPLICAS)),
        st.tuples(st.just("stall"), st.sampled_from(REPLICAS)),
        st.tuples(st.just("hand_back"), st.sampled_from(REPLICAS)),
        st.tuples(st.just("withdraw"), st.sampled_from(TENANTS), st.integers(0, 5)),
        st.tuples(st.just("read"), st.sampled_from(TENANTS)),
        st.tuples(st.just("flush")),
    ),
    max_size=40,
)


class World:
    """Trainers and replicas as they should behave, and what the trainers got to see."""

    def __init__(self, connection: QueueConnection, redis: Any) -> None:
        self.connection = connection
        self.redis = redis
        self.open: dict[tuple[str, str], int] = {}
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.expected: Counter[tuple[str, str]] = Counter()
        self.held: dict[str, list[Any]] = {name: [] for name in REPLICAS}

    async def run(self, name: str, *args: Any) -> Any:
        return await self.connection.script(name, KEYS.active, KEYS.prefix, *args)

    def beat(self) -> None:
        for tenant in TENANTS:
            self.redis.set(KEYS.alive(tenant, LIFE), "1", px=60_000)

    async def submit(self, tenant: str, number: int, tokens: int) -> None:
        """A new rollout, or the same one again while it is open."""
        rollout = (tenant, f"r.{number}")
        if rollout not in self.open:
            self.expected[rollout] += 1
            self.open[rollout] = tokens
        prompt = "even" if number % 2 == 0 else "odd"
        await self.run("submit", tenant, LIFE, rollout[1], self.open[rollout], 60_000, 0, prompt, b"body", 90_000, 0.7)

    async def take(self, replica: str, budget: int) -> None:
        held = self.held[replica]
        if any(item[5] > 1 for item in held):
            return
        rows, _, _ = await self.run("take", replica, budget, 3, 600_000, 4, len(held), 50, 60_000)
        fresh, again = [row for row in rows if row[5] == 1], [row for row in rows if row[5] > 1]
        assert not again or (len(rows) == 1 and not held)
        assert sum(row[4] for row in fresh) <= budget or len(rows) == 1 or budget == 0
        held.extend(rows)

    async def complete(self, replica: str, position: int, *, times: int = 1) -> None:
        if self.held[replica]:
            tenant, entry_id, rollout_id, life, *_ = self.held[replica].pop(position % len(self.held[replica]))
            answers = [
                await self.run("complete", replica, tenant, entry_id, life, rollout_id, "ok", b"ok\n\nx", 60_000)
                for _ in range(times)
            ]
            assert answers.count(b"done") <= 1

    async def complete_twice(self, replica: str) -> None:
        await self.complete(replica, 0, times=2)

    async def crash(self, replica: str) -> None:
        """The replica forgets what it held, and its leases run out."""
        self.held[replica] = []
        await self.stall(replica)

    async def stall(self, replica: str) -> None:
        """The leases run out, but the replica goes on and answers late."""
        for tenant in TENANTS:
            stream = KEYS.requests(tenant)
            if self.redis.exists(stream) and self.redis.xinfo_groups(stream):
                for record in self.redis.xpending_range(stream, GROUP, "-", "+", 100, consumername=replica):
                    self.redis.xclaim(stream, GROUP, replica, 0, [record["message_id"]], idle=1_000_000, justid=True)

    async def hand_back(self, replica: str) -> None:
        pairs = [part for item in self.held[replica] for part in item[:2]]
        await self.run("hand_back", replica, *pairs)
        self.held[replica] = []

    async def withdraw(self, tenant: str, number: int) -> None:
        """A caller gives up; it no longer expects an answer."""
        if self.open.pop((tenant, f"r.{number}"), None) is not None:
            await self.run("withdraw", tenant, LIFE, f"r.{number}")
            self.expected[tenant, f"r.{number}"] -= 1

    async def read(self, tenant: str) -> None:
        """A trainer reads its announcements as the client does: reply fetched, then both deleted."""
        for entry_id, fields in self.redis.xrange(KEYS.replies(tenant, LIFE)):
            rollout_id = fields[b"r"].decode()
            key = KEYS.reply(tenant, LIFE, rollout_id)
            if self.redis.get(key) is not None and self.open.pop((tenant, rollout_id), None) is not None:
                self.outcomes[tenant, rollout_id] += 1
            self.redis.delete(key)
            self.redis.xdel(KEYS.replies(tenant, LIFE), entry_id)

    async def flush(self) -> None:
        """Redis loses everything; the trainers notice and ask what became of their rollouts."""
        self.redis.flushall()
        self.beat()
        for (tenant, rollout_id), tokens in self.open.items():
            if await self.run("probe", tenant, LIFE, rollout_id) == [b"absent"]:
                await self.submit(tenant, int(rollout_id[2:]), tokens)

    async def finish(self) -> None:
        """Two sound replicas work until nothing is open."""
        for replica in REPLICAS:
            await self.crash(replica)
        for _ in range(60):
            for replica in REPLICAS:
                await self.take(replica, 1000)
                while self.held[replica]:
                    await self.complete(replica, 0)
            for tenant in TENANTS:
                await self.read(tenant)
            if not self.open:
                break


async def play(url: str, redis: Any, script: list[tuple[Any, ...]]) -> World:
    redis.flushall()
    connection = QueueConnection(url, patience_s=2.0)
    world = World(connection, redis)
    try:
        world.beat()
        for name, *arguments in script:
            await getattr(world, name)(*arguments)
        await world.finish()
        await world.take("one", 1000)
    finally:
        await connection.close()
    return world


@given(script=actions)
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_rollout_is_answered_exactly_once(redis_url: str, script: list[tuple[Any, ...]]) -> None:
    with Redis.from_url(redis_url) as redis:
        world = asyncio.run(play(redis_url, redis, script))
        assert world.open == {}
        assert +world.outcomes == +world.expected
        left_over = {key.decode().removeprefix(KEYS.prefix).split(":")[0] for key in redis.keys("*")}
        assert left_over <= {"alive", "ring", "counters", "replies", "drain", "dead", "dead_tenants", "body", "wake"}
        letters = sum(redis.xlen(KEYS.dead(tenant)) for tenant in TENANTS)
        assert len(redis.keys(KEYS.prefix + "body:*")) <= letters
