"""`opd tenants`: makes, rotates and removes tenants in their file, and renders Redis access rules from it.

A token is shown once, or written to a file for its owner alone, and kept nowhere.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Who may ask the teachers: tokens, shares, rights.", no_args_is_help=True)

FileOption = Annotated[Path, typer.Option("--file", "-f", envvar="OPD_TENANTS_FILE", help="The tenants file.")]
NameArgument = Annotated[str, typer.Argument(help="[a-z0-9-], at most 63 characters.")]
TokenFileOption = Annotated[
    Path | None, typer.Option(help="Write the token to this new file, mode 600, instead of showing it.")
]
_DEFAULT_FILE = Path("tenants.toml")


@app.command("add")
def add(
    name: NameArgument,
    file: FileOption = _DEFAULT_FILE,
    weight: Annotated[float, typer.Option(help="Share of the teachers relative to 1.")] = 1.0,
    max_inflight_tokens: Annotated[int | None, typer.Option(help="Cap on tokens in flight; default: none.")] = None,
    hidden_states: Annotated[bool, typer.Option("--hidden-states", help="Right to parts of the model.")] = False,
    token_file: TokenFileOption = None,
) -> None:
    """Enters a tenant and makes its token."""
    from services.teacher_server.tenants_file import add_tenant

    def enter(token: str) -> None:
        add_tenant(
            file, name, token, weight=weight, max_inflight_tokens=max_inflight_tokens, hidden_states=hidden_states
        )

    _hand_over(enter, token_file)


@app.command("list")
def show(file: FileOption = _DEFAULT_FILE) -> None:
    """Lists tenants; tokens cannot be shown, only how many are valid."""
    from services.teacher_server.tenants import load_tenants

    for name, tenant in load_tenants(file).tenants.items():
        cap = tenant.max_inflight_tokens or "none"
        typer.echo(
            f"{name}: weight {tenant.weight:g}, cap {cap}, hidden states {'yes' if tenant.hidden_states else 'no'}, "
            f"{len(tenant.token_sha256)} valid token{'s' if len(tenant.token_sha256) > 1 else ''}"
        )


@app.command("rotate")
def rotate(
    name: NameArgument,
    file: FileOption = _DEFAULT_FILE,
    drop_old: Annotated[bool, typer.Option("--drop-old", help="End it: only the newest stays valid.")] = False,
    token_file: TokenFileOption = None,
) -> None:
    """Makes a new token beside the old one; when everybody uses it, run again with --drop-old."""
    from services.teacher_server.tenants_file import add_token, drop_old_token

    if drop_old:
        drop_old_token(file, name)
        typer.echo(f"{name}: only the newest token is valid now")
        return
    _hand_over(lambda token: add_token(file, name, token), token_file)


@app.command("remove")
def remove(name: NameArgument, file: FileOption = _DEFAULT_FILE) -> None:
    """Shuts a tenant out; over Redis once `opd tenants acl --apply` ran."""
    from services.teacher_server.tenants_file import remove_tenant

    remove_tenant(file, name)
    typer.echo(f"{name}: is removed from {file}")


@app.command("acl")
def acl(
    teachers: Annotated[list[str], typer.Option("--teacher", help="A pool they may ask; may be repeated.")],
    file: FileOption = _DEFAULT_FILE,
    redis_version: Annotated[str, typer.Option(help="Of the server that reads the file: 6.2, or 7.0 and up.")] = "7.0",
    pool_user: Annotated[str, typer.Option(help="Also the replicas' own user, of this name.")] = "",
    pool_password_file: Annotated[Path | None, typer.Option(help="Holds its password.")] = None,
    close_default: Annotated[bool, typer.Option("--close-default", help="Also turn Redis's default user off.")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Set the users of the running Redis.")] = False,
    redis_url: Annotated[str | None, typer.Option(help="Of the running Redis; default: OPD_REDIS_URL.")] = None,
    trust_network: Annotated[
        bool, typer.Option("--trust-network", help="The way to it is private: send the password without TLS.")
    ] = False,
) -> None:
    """Prints the tenants' Redis users as an ACL file, or sets those of a running Redis and removes who left."""
    from services.teacher_server.queue_access import QueueAccess
    from services.teacher_server.tenant_access import AccessPlan, apply_plan, render_plan

    plan = AccessPlan.load(
        file, teachers, pool_user=pool_user, pool_password_file=pool_password_file, close_default=close_default
    )
    if apply:
        typer.echo(apply_plan(plan, QueueAccess(redis_url=redis_url, trust_network=trust_network)))
    else:
        typer.echo(render_plan(plan, redis_version))


def _hand_over(enter: Callable[[str], None], token_file: Path | None) -> None:
    """Makes a token and enters it; its file comes first, so that no token is valid that nobody has."""
    from services.teacher_server.tenants import new_token
    from services.teacher_server.tenants_file import write_secret

    token = new_token()
    if token_file is None:
        enter(token)
        typer.echo(token)
        return
    write_secret(token_file, token)
    try:
        enter(token)
    except BaseException:
        token_file.expanduser().unlink()
        raise
    typer.echo(f"the token is in {token_file}", err=True)
