"""Teachers: who they say they are over the queue and over gRPC, and whether replicas of one pool share its work."""

import asyncio
import socket

from opd.errors import OpdError
from opd.queue.connection import QueueConnection
from opd.queue.pools import read_info, resolve_pool
from opd.queue.status import PoolStatus, ReplicaStatus, read_status
from opd.rpc.client import GrpcScoreClient
from opd.types import TeacherInfo
from opd.wire.messages import decode_info
from services.doctor.findings import Finding, fail, ok, warn
from services.doctor.plan import Plan
from services.doctor.redis_checks import check_rights
from services.doctor.score_check import check_score

_SILENT_S = 8.0
"""Replicas announce themselves every two seconds unless told otherwise."""
_SECOND_LOOK_S = 1.0


async def check_pool_queue(plan: Plan, connection: QueueConnection, teacher: str) -> list[Finding]:
    """One pool as its queue shows it."""
    pool = await resolve_pool(connection, teacher)
    findings = [await check_rights(plan, connection, pool), await _handshake(connection, teacher, pool)]
    if not plan.tenant:
        findings += await _replicas(connection, pool)
    if plan.scores:
        assert plan.redis_url is not None
        findings.append(await check_score(plan, plan.redis_url, teacher))
    return findings


async def _handshake(connection: QueueConnection, teacher: str, pool: str) -> Finding:
    check = f"handshake of {teacher}"
    try:
        info = decode_info(await read_info(connection, pool))
    except OpdError as error:
        return fail(check, error.message, f"opd teacher serve teacher={teacher.partition('@')[0]} redis_url=..., or "
                    "correct the name")  # fmt: skip
    way = "" if pool == teacher else f"through {pool}, "
    return ok(check, way + _describe(info))


def _describe(info: TeacherInfo) -> str:
    return f"{info.teacher}@{info.fingerprint[:12]}, {info.model} on {info.engine}, version {info.version or 'unknown'}"


async def _replicas(connection: QueueConnection, pool: str) -> list[Finding]:
    first = await read_status(connection, pool)
    findings = [_judge_number(first)]
    if first.dead_letters:
        findings.append(warn(f"dead letters of {pool}", f"{first.dead_letters} requests were put aside",
                             f"opd pool dead list --teacher {pool}"))  # fmt: skip
    if len(first.replicas) < 2:
        return findings
    findings.append(_judge_likeness(first))
    uneven = _uneven(first)
    if uneven:
        # A replica may have been between two takes.
        await asyncio.sleep(_SECOND_LOOK_S)
        uneven = _uneven(await read_status(connection, pool))
    check = f"balance of {pool}"
    if uneven:
        mend = "look at the log and /readyz of the idle one; leases of a dead one run out by themselves"
        return [*findings, warn(check, uneven, mend)]
    held = ", ".join(f"{replica.replica_id} holds {replica.leased_entries}" for replica in first.replicas)
    return [*findings, ok(check, held)]


def _judge_number(state: PoolStatus) -> Finding:
    check = f"replicas of {state.pool}"
    silent = [replica.replica_id for replica in state.replicas if replica.age_s > _SILENT_S]
    if not state.replicas:
        waits = f"none lives and {state.backlog_entries} requests wait"
        mend = "start one, or look why the autoscaler does not"
        return fail(check, waits, mend) if state.backlog_entries else warn(check, "none lives, nothing waits", mend)
    if silent:
        return warn(check, f"{', '.join(silent)} said nothing for over {_SILENT_S:g} s", "look at its log")
    return ok(check, f"{len(state.replicas)} live, {state.backlog_entries} requests wait or are being scored")


def _judge_likeness(state: PoolStatus) -> Finding:
    check = f"likeness of {state.pool}"
    prints, versions = _values(state, "fingerprint"), _values(state, "version")
    if len(prints) > 1:
        return fail(check, f"replicas of one pool are {len(prints)} different teachers: {_listed(prints)}",
                    "serve each with queue.per_fingerprint=true and choose by opd pool promote")  # fmt: skip
    if len(versions) > 1:
        return warn(check, f"replicas are of different versions: {_listed(versions)}",
                    "finish the upgrade; mixed versions work meanwhile (docs/upgrades.md)")  # fmt: skip
    return ok(check, "all replicas are the same teacher of the same version")


def _values(state: PoolStatus, name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for replica in state.replicas:
        found.setdefault(getattr(replica, name), []).append(replica.replica_id)
    return found


def _listed(by_value: dict[str, list[str]]) -> str:
    return "; ".join(f"{value[:12] or 'unknown'} ({', '.join(names)})" for value, names in sorted(by_value.items()))


def _uneven(state: PoolStatus) -> str:
    """Requests wait, one replica holds nothing, and another holds several: empty where that is not so."""
    waiting = state.backlog_entries - state.leased_entries
    idle = [replica for replica in state.replicas if not replica.leased_entries]
    busiest = max(state.replicas, key=_held, default=None)
    if waiting < 1 or not idle or busiest is None or busiest.leased_entries < 2:
        return ""
    names = ", ".join(replica.replica_id for replica in idle)
    return f"{names} holds nothing, {busiest.replica_id} holds {busiest.leased_entries}, and {waiting} requests wait"


def _held(replica: ReplicaStatus) -> int:
    return replica.leased_entries


async def check_grpc(plan: Plan, url: str) -> list[Finding]:
    """Every replica behind one gRPC address, asked by itself."""
    scheme, _, target = url.partition("://")
    addresses = await _addresses(target) if "://" in url else [""]
    if not addresses:
        return [fail(f"grpc {url}", "its name leads to no address", "correct it, or start a replica")]
    if len(addresses) == 1 or scheme == "grpcs":
        # Over TLS the certificate is of the name, so that addresses cannot be asked by themselves.
        found: dict[str, TeacherInfo | Finding] = {url: await _ask(plan, url)}
    else:
        urls = [f"{scheme}://{address}" for address in addresses]
        found = dict(zip(urls, await asyncio.gather(*(_ask(plan, one) for one in urls)), strict=True))
    infos = {one: info for one, info in found.items() if isinstance(info, TeacherInfo)}
    findings = [
        info if isinstance(info, Finding) else ok(f"grpc {one}", _describe(info)) for one, info in found.items()
    ]
    prints = {info.fingerprint for info in infos.values()}
    if len(prints) > 1:
        findings.append(fail(f"likeness of {url}", f"its replicas are {len(prints)} different teachers",
                             "give each its own name"))  # fmt: skip
    if plan.scores and infos:
        findings.append(await check_score(plan, url, next(iter(infos.values())).teacher))
    return findings


async def _addresses(target: str) -> list[str]:
    """`host:port` of everything the name resolves to; a socket's path is itself."""
    host, _, port = target.rstrip("/").rpartition(":")
    if not port.isdigit() or not host:
        return [target]
    try:
        loop = asyncio.get_running_loop()
        rows = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError:
        return []
    return sorted({f"[{row[4][0]}]:{port}" if ":" in str(row[4][0]) else f"{row[4][0]}:{port}" for row in rows})


async def _ask(plan: Plan, url: str) -> TeacherInfo | Finding:
    check = f"grpc {url}"
    try:
        async with asyncio.timeout(2 * plan.patience_s):
            async with GrpcScoreClient(url, credentials=plan.credentials) as client:
                return await client.info()
    except OpdError as error:
        return fail(check, error.message, "start it, correct the address, or give --token-file and --ca-file")
    except TimeoutError:
        return fail(check, f"no answer within {2 * plan.patience_s:g} s", "look at its log and at the way to it")
