"""Runs the checks in order and prints what they found, for people or for programs."""

import asyncio
import dataclasses
import json
import logging
from collections.abc import Awaitable, Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.errors import ConfigError, OpdError
from opd.queue.connection import QueueConnection
from services.doctor.file_checks import check_files
from services.doctor.findings import Finding, Verdict, exit_code, fail
from services.doctor.plan import Plan
from services.doctor.redis_checks import check_redis, no_redis
from services.doctor.teacher_checks import check_grpc, check_pool_queue
from services.doctor.tenant_checks import check_tenant_users

_STYLES = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red", Verdict.SKIPPED: "dim"}
_PIPE_WIDTH = 160


async def examine(plan: Plan) -> list[Finding]:
    """Every finding; what goes wrong in one check is a finding of that check."""
    findings = check_files(plan)
    findings += await _guarded("redis", lambda: _examine_queue(plan))
    for url in plan.grpc_urls:
        findings += await _guarded(f"grpc {url}", lambda url=url: check_grpc(plan, url))  # type: ignore[misc]
    return findings


async def _examine_queue(plan: Plan) -> list[Finding]:
    if plan.redis_url is None:
        return [no_redis()]
    credentials = plan.credentials if plan.tenant else plan.redis_credentials
    connection = QueueConnection(plan.redis_url, patience_s=plan.patience_s, credentials=credentials)
    try:
        findings = await check_redis(plan, connection)
        if findings[0].verdict is Verdict.FAIL:
            return findings
        for teacher in plan.teachers:
            findings += await _guarded(
                f"pool {teacher}",
                lambda teacher=teacher: check_pool_queue(plan, connection, teacher),  # type: ignore[misc]
            )
        return findings + await _guarded("redis users of tenants", lambda: check_tenant_users(plan, connection))
    finally:
        await connection.close()


async def _guarded(check: str, work: Callable[[], Awaitable[list[Finding]]]) -> list[Finding]:
    try:
        return await work()
    except ConfigError as error:
        return [fail(check, error.message, "correct the setting that it names")]
    except OpdError as error:
        return [fail(check, error.message, "as the message says")]
    except Exception as error:
        return [fail(check, f"a fault of this check: {type(error).__name__}: {error}", "report it with this line")]


def run_doctor(plan: Plan, *, as_json: bool) -> int:
    """Prints the findings and returns the exit code."""
    # What would be logged on the way is among the findings.
    logging.getLogger().addHandler(logging.NullHandler())
    findings = asyncio.run(examine(plan))
    if as_json:
        _print_json(findings)
    else:
        _print_table(findings)
    return exit_code(findings)


def _print_json(findings: list[Finding]) -> None:
    report = {"is_sound": not exit_code(findings), "findings": [dataclasses.asdict(finding) for finding in findings]}
    Console(soft_wrap=True, highlight=False, markup=False, emoji=False).print(json.dumps(report, indent=2))


def _print_table(findings: list[Finding]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    table = Table("", "check", "what was found", "what to do", box=None, pad_edge=False)
    for finding in findings:
        verdict = Text(finding.verdict.value, style=_STYLES[finding.verdict])
        table.add_row(verdict, Text(finding.check), Text(finding.message), Text(finding.mend))
    console.print(table)
    counts = {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    said = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict])
    console.print(Text(f"{said or 'nothing was asked for'}"))
