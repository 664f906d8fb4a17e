"""`opd pool ...`: a pool of teachers as its queue shows it, also while none runs. Loads no torch.

Everything here reads or writes Redis through `services.teacher_server.pool`; tables are drawn by `services.pool_view`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from services.teacher_server.queue_access import QueueAccess

pool_app = typer.Typer(help="A pool of teachers as its queue shows it.", no_args_is_help=True)
dead_app = typer.Typer(help="Requests that were put aside after several failures.", no_args_is_help=True)
pool_app.add_typer(dead_app, name="dead")

RedisOption = Annotated[str | None, typer.Option(help="redis:// or unix:// URL; default: OPD_REDIS_URL.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-network", help="The way to Redis is private: send the password without TLS.")
]
TeacherOption = Annotated[str, typer.Option("--teacher", help="The pool's name.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]
TenantArgument = Annotated[str, typer.Argument(help="Whose it is.")]
DeadArgument = Annotated[str, typer.Argument(help="As `list` shows it.")]


@pool_app.command("serve")
def pool_serve(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted overrides, e.g. port=8090.", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.")] = None,
) -> None:
    """Serves the pool's state over HTTP, also while no teacher runs: what an autoscaler reads."""
    from services.teacher_server.pool import run_pool

    raise typer.Exit(run_pool(config, overrides or []))


@pool_app.command("status")
def pool_status(
    teachers: Annotated[
        list[str] | None, typer.Argument(help="Names, or name@fingerprint; default: teacher.", show_default=False)
    ] = None,
    redis_url: RedisOption = None,
    trust_network: TrustOption = False,
    once: Annotated[bool, typer.Option("--once", help="Print once instead of until Ctrl-C.")] = False,
    as_json: JsonOption = False,
    every_s: Annotated[float, typer.Option("--every-s", min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Shows replicas, tenants, backlog and speed, refreshed until Ctrl-C."""
    from services.pool_view import print_status, watch_status

    names, access = teachers or ["teacher"], _access(redis_url, trust_network)
    if once or as_json:
        print_status(access, names, as_json=as_json)
    else:
        watch_status(access, names, every_s=every_s)


@pool_app.command("promote")
def pool_promote(
    name: Annotated[str, typer.Argument(help="The teacher's name, as trainers ask for it.")],
    pool: Annotated[str, typer.Argument(help="name@fingerprint of the pool that is to serve it.")],
    redis_url: RedisOption = None,
    trust_network: TrustOption = False,
    force: Annotated[bool, typer.Option("--force", help="Also to a pool without a live replica.")] = False,
) -> None:
    """Lets a teacher's name lead to another pool: trainers follow at their next step."""
    from services.teacher_server.pool import promote

    before = promote(_access(redis_url, trust_network), name, pool, is_forced=force)
    typer.echo(f"{name} is now served by {pool} (before: {before or name})")


@dead_app.command("list")
def dead_list(
    teacher: TeacherOption = "teacher",
    redis_url: RedisOption = None,
    trust_network: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Lists them by tenant, oldest first."""
    from services.pool_view import print_dead_letters
    from services.teacher_server.pool import dead_letters

    print_dead_letters(teacher, dead_letters(_access(redis_url, trust_network), teacher), as_json=as_json)


@dead_app.command("show")
def dead_show(
    tenant: TenantArgument,
    dead_id: DeadArgument,
    teacher: TeacherOption = "teacher",
    redis_url: RedisOption = None,
    trust_network: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Shows one with its request."""
    from services.pool_view import print_dead_letter
    from services.teacher_server.pool import dead_letter

    print_dead_letter(*dead_letter(_access(redis_url, trust_network), teacher, tenant, dead_id), as_json=as_json)


@dead_app.command("requeue")
def dead_requeue(
    tenant: TenantArgument,
    dead_id: DeadArgument,
    teacher: TeacherOption = "teacher",
    redis_url: RedisOption = None,
    trust_network: TrustOption = False,
) -> None:
    """Puts one back into the queue."""
    from services.teacher_server.pool import requeue_dead_letter

    typer.echo(f"requeued as entry {requeue_dead_letter(_access(redis_url, trust_network), teacher, tenant, dead_id)}")


def _access(redis_url: str | None, trust_network: bool) -> "QueueAccess":
    from services.teacher_server.queue_access import QueueAccess

    return QueueAccess(redis_url=redis_url, trust_network=trust_network)
