"""The `opd` command: one entry for both services and the tools around them.

A subcommand imports its service only when it runs, so that `--help` answers at once and the teacher's machine needs
nothing of the trainer's. A fault of the user's is one line on standard error and exit code 2, never a traceback.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from opd.errors import ConfigError, InvalidRequestError, OpdError
from opd.lifecycle import die_with_parent
from opd.logs import give_up
from services.doctor_cli import doctor
from services.eval_cli import auroc, continuation, evaluate
from services.experiment_cli import experiment_app
from services.parts import missing_part
from services.pool_cli import pool_app
from services.preflight_cli import preflight
from services.recipes_cli import cold_start, data
from services.score_cli import score
from services.tenants_cli import app as tenants_app

# Locals of a traceback may be tokens and prompts.
app = typer.Typer(
    help="On-policy distillation as services.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
teacher_app = typer.Typer(help="The teacher service.", no_args_is_help=True)
app.add_typer(teacher_app, name="teacher")
app.add_typer(tenants_app, name="tenants")
app.add_typer(pool_app, name="pool")
app.add_typer(experiment_app, name="experiment")
app.command()(score)
app.command("eval")(evaluate)
app.command()(continuation)
app.command()(auroc)
app.command()(data)
app.command("cold-start")(cold_start)
app.command()(preflight)
app.command()(doctor)

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides, e.g. optim.lr=3e-4.", show_default=False)
]


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of prompts, rollouts and evaluation.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; default: as configured.")] = None,
    run_dir: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/demo"),
    redis_url: Annotated[
        str | None,
        typer.Option(
            envvar="OPD_REDIS_URL", help="Use this Redis and the teacher that serves it, instead of starting both."
        ),
    ] = None,
    teacher: Annotated[
        str, typer.Option(help="Bundled teacher: teacher-post, teacher-big or teacher-other.")
    ] = "teacher-post",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting of the trainer, e.g. http.port=8081.")
    ] = None,
) -> None:
    """Distils the bundled student from a bundled teacher through the queue and prints one table."""
    from testbed.demo import run_demo

    raise typer.Exit(
        run_demo(
            seed=seed, steps=steps, run_dir=run_dir, redis_url=redis_url, teacher=teacher, further=tuple(set_ or ())
        )
    )


@app.command("redis")
def redis_serve(
    data_dir: Annotated[Path, typer.Option(help="Where its data and its socket are.")] = Path("runs/redis"),
) -> None:
    """Runs a Redis for this machine until Ctrl-C and prints its URL, for OPD_REDIS_URL."""
    from services.redis_command import serve_redis

    raise typer.Exit(serve_redis(data_dir))


@teacher_app.command("serve")
def teacher_serve(
    overrides: Overrides = None,
    config: ConfigOption = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Written once the teacher is ready: ports, pid, fingerprint.")
    ] = None,
) -> None:
    """Serves a teacher over gRPC, HTTP and, with redis_url=..., the queue."""
    from services.teacher_server.server import run_teacher

    raise typer.Exit(run_teacher(config, overrides or [], ready_file))


@app.command()
def train(
    overrides: Overrides = None,
    config: ConfigOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of run_dir.")] = False,
) -> None:
    """Distils a student from a teacher pool."""
    from services.trainer.run import end_process, run_training

    end_process(run_training(config, overrides or [], resume=resume))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, one or several side by side.")],
    output: Annotated[Path | None, typer.Option(help="HTML file; default: report.html in the first run.")] = None,
) -> None:
    """Draws the paper's figures for one run or several."""
    from services.trainer.report import write_report

    target = output or runs[0] / "report.html"
    write_report(runs, target)
    typer.echo(f"wrote {target}")


def main() -> None:
    """Runs the command; every error of the tree is one line and an exit code."""
    die_with_parent()
    try:
        app()
    except (ConfigError, InvalidRequestError) as error:
        _fail(error, 2)
    except OpdError as error:
        _fail(error, 1)
    except ModuleNotFoundError as error:
        sys.stderr.write(f"opd: {missing_part(error)}\n")
        sys.exit(2)


def _fail(error: OpdError, code: int) -> None:
    give_up("opd", error)
    sys.exit(code)


if __name__ == "__main__":
    main()
