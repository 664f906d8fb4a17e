"""`opd doctor`: what to look at, from options and the usual variables."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from services.doctor.plan import Plan

_SECRETS = ("OPD_REDIS_URL", "OPD_REDIS_PASSWORD", "OPD_TOKEN")


def doctor(
    redis_url: Annotated[str | None, typer.Option(help="Of the queue; default: OPD_REDIS_URL or its file.")] = None,
    teachers: Annotated[list[str] | None, typer.Option("--teacher", help="A pool; may be repeated.")] = None,
    grpc: Annotated[list[str] | None, typer.Option(help="grpc(s)://host:port of teachers; may be repeated.")] = None,
    tenant: Annotated[str, typer.Option(help="Look as this tenant's trainer would, with its token.")] = "",
    user: Annotated[str, typer.Option(help="User of Redis; its password is OPD_REDIS_PASSWORD or its file.")] = "",
    score: Annotated[bool, typer.Option("--score", help="Send one request through each pool and address.")] = False,
    tenants_file: Annotated[Path | None, typer.Option(envvar="OPD_TENANTS_FILE", help="Of `opd tenants`.")] = None,
    folder: Annotated[
        list[Path] | None, typer.Option(help="Where something will be written; default: runs, ~/.cache/opd.")
    ] = None,
    secret: Annotated[list[Path] | None, typer.Option(help="A file that holds a secret; may be repeated.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="The tenant's token; default: OPD_TOKEN_FILE.")] = None,
    ca_file: Annotated[Path | None, typer.Option(help="PEM file: who may sign the servers' certificates.")] = None,
    cert_file: Annotated[Path | None, typer.Option(help="PEM file: our certificate, for mutual TLS.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="PEM file: its key.")] = None,
    trust_network: Annotated[bool, typer.Option("--trust-network", help="The way is private: no TLS needed.")] = False,
    patience_s: Annotated[float, typer.Option(min=0.1, help="Of each question to a server.")] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Looks an installation over and says what to mend; exit code 1 when something does not work."""
    from opd.credentials import Credentials
    from services.doctor.command import run_doctor
    from services.doctor.plan import Plan

    files = _secret_files(token_file, secret or [])
    # One that cannot be read is a finding, and what needs it is then looked at without it.
    way = {"ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
    plan = Plan(
        redis_url=redis_url or _secret("OPD_REDIS_URL"),
        teachers=tuple(teachers or ()),
        grpc_urls=tuple(grpc or ()),
        tenant=tenant,
        credentials=Credentials(token=_token(token_file), user=tenant, trust_network=trust_network, **way),
        redis_credentials=Credentials(
            token=_secret("OPD_REDIS_PASSWORD"), user=user, trust_network=trust_network, **way
        ),
        scores=score,
        tenants_file=tenants_file,
        secret_files=files,
        plain_secrets=_plain_secrets(),
        folders=tuple(folder or (Path("runs"), Path("~/.cache/opd"))),
        patience_s=patience_s,
    )
    _check_names(plan)
    raise typer.Exit(run_doctor(plan, as_json=as_json))


def _secret_files(token_file: Path | None, others: list[Path]) -> tuple[tuple[str, Path], ...]:
    named = [(f"{name}_FILE", Path(os.environ[f"{name}_FILE"])) for name in _SECRETS if os.environ.get(f"{name}_FILE")]
    given = [("--token-file", token_file)] if token_file else []
    return (*named, *given, *((str(path), path) for path in others))


def _plain_secrets() -> tuple[str, ...]:
    # A URL is no secret by itself; one with a password is told with the checks of Redis.
    return tuple(name for name in _SECRETS[1:] if os.environ.get(name) and not os.environ.get(f"{name}_FILE"))


def _secret(name: str) -> str | None:
    from opd.errors import ConfigError
    from opd.settings import read_secret

    try:
        return read_secret(name)
    except ConfigError:
        return None


def _token(token_file: Path | None) -> str | None:
    from opd.errors import ConfigError
    from opd.settings import read_secret_file

    try:
        return read_secret_file("--token-file", token_file) if token_file else _secret("OPD_TOKEN")
    except ConfigError:
        return None


def _check_names(plan: "Plan") -> None:
    """Raises InvalidRequestError for names that could not stand in a key, before anything is asked."""
    from opd.queue.keys import check_pool, check_tenant

    for teacher in plan.teachers:
        check_pool(teacher)
    if plan.tenant:
        check_tenant(plan.tenant)
