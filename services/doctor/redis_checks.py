"""Redis: reachable, new enough, set up so that it loses nothing, and open to whom it should be."""

import re

from opd.errors import OpdError, QueueMisconfiguredError, QueueUnavailableError, UnauthenticatedError
from opd.queue.client_rules import MEMORY_FRACTION
from opd.queue.connection import QueueConnection
from opd.queue.examination import ServerFacts, missing_pool_rights, missing_tenant_rights, read_server
from services.doctor.entrance_checks import check_entrance
from services.doctor.findings import Finding, fail, ok, skipped, warn
from services.doctor.plan import Plan

_OLDEST, _ADVISED = (6, 2), (7, 0)
_NEARLY = 0.6
_MIB = 2**20


async def check_redis(plan: Plan, connection: QueueConnection) -> list[Finding]:
    """All of the server; the first finding alone where it cannot be talked to."""
    try:
        facts = await read_server(connection)
    except UnauthenticatedError as error:
        return [fail("redis user", error.message, "give the password of this user, or another user")]
    except QueueUnavailableError as error:
        return [fail("redis", error.message, "start it, correct the URL, or open the way to it")]
    except QueueMisconfiguredError as error:
        return [fail("redis", error.message, "make INFO whole, or run a Redis or Valkey of your own")]
    except OpdError as error:
        # A tenant's user may not be allowed to ask for everything; what follows says what it lacks.
        return [fail("redis", error.message, _RENDER)]
    findings = [
        ok("redis", f"{connection.label} answers{f' user {facts.user}' if facts.user else ''}"),
        judge_version(facts.version),
        judge_policy(facts.policy),
        _judge_memory(facts),
        _judge_persistence(facts),
    ]
    return [*findings, *await check_entrance(plan)]


_RENDER = "opd tenants acl --apply, with every pool named by --teacher"


def judge_version(version: str) -> Finding:
    """Of a server that calls itself `version`."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < _OLDEST:
        return fail("redis version", f"{version} lacks commands that the queue is made of", "run 7, or 6.2 at least")
    if numbers < _ADVISED:
        return warn("redis version", f"{version} knows no read-only keys: tenants can write limits and handshake",
                    "run 7 where tenants have users of their own")  # fmt: skip
    return ok("redis version", version)


def judge_policy(policy: str) -> Finding:
    """Of a maxmemory-policy."""
    if policy == "noeviction":
        return ok("redis memory policy", policy)
    return fail("redis memory policy", f"{policy} lets Redis throw requests away",
                "CONFIG SET maxmemory-policy noeviction, and in its configuration file")  # fmt: skip


def _judge_memory(facts: ServerFacts) -> Finding:
    check, used = "redis memory", facts.used_memory_bytes
    if not facts.max_memory_bytes:
        return warn(check, f"{used / _MIB:.0f} MiB used and no maxmemory: a backlog grows until the machine is full",
                    "CONFIG SET maxmemory to what it may have")  # fmt: skip
    share = used / facts.max_memory_bytes
    message = f"{used / _MIB:.0f} of {facts.max_memory_bytes / _MIB:.0f} MiB used ({share:.0%})"
    mend = "raise maxmemory, add replicas, cap tenants, or throw dead letters away"
    if share > MEMORY_FRACTION:
        return fail(check, f"{message}; nothing is admitted above {MEMORY_FRACTION:.0%}", mend)
    return warn(check, message, mend) if share > _NEARLY else ok(check, message)


def _judge_persistence(facts: ServerFacts) -> Finding:
    check = "redis persistence"
    if facts.writes_fail:
        return fail(check, "its last write to disk failed, so that it may refuse commands",
                    "look at its log and its disk")  # fmt: skip
    if facts.has_append_only_file:
        return ok(check, "append-only file")
    return warn(check, "no append-only file: after a restart trainers send everything again",
                "CONFIG SET appendonly yes, and in its configuration file")  # fmt: skip


async def check_rights(plan: Plan, connection: QueueConnection, pool: str) -> Finding:
    """Whether this user may do what its role does in one pool."""
    role = f"tenant {plan.tenant}" if plan.tenant else "replicas and operators"
    check = f"redis rights in {pool}"
    if plan.tenant:
        refused = await missing_tenant_rights(connection, pool, plan.tenant)
    else:
        refused = await missing_pool_rights(connection, pool)
    if not refused:
        return ok(check, f"all that {role} need")
    shown = ", ".join(refused[:4]) + (f" and {len(refused) - 4} more" if len(refused) > 4 else "")
    return fail(check, f"refused of what {role} need: {shown}", _RENDER)


def no_redis() -> Finding:
    return skipped("redis", "no URL is given; set OPD_REDIS_URL or give --redis-url")
