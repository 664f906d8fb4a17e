"""The demo: a bundled student distilled from a bundled teacher, through the queue, by the real services.

Launcher of everything: it starts Redis, a teacher and a trainer (or uses the ones it is pointed at), evaluates before
and after, and writes `summary.json` and `report.html` into the run folder. Whatever it started is stopped when it ends,
on Ctrl-C and on failure too.
"""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from opd.errors import ConfigError
from services.trainer.evaluation.estimates import gap_recovery
from services.trainer.report import write_report
from testbed.processes import Terminated, terminable
from testbed.scores import PAPER, TEMPERATURE_ONE, Score, evaluate_all
from testbed.stack import DATA, MODELS, Stack, connected, latest_checkpoint, launched, train

CONFIG = Path(__file__).with_name("demo.toml")
STUDENT = "student-base"
HELD_OUT = DATA / "heldout.jsonl"
TRAIN = DATA / "train.jsonl"
_INTERRUPTED = 130
# As in the configuration; a shorter run warms up no longer than it is.
_WARMUP_STEPS = 3


def run_demo(
    *, seed: int, steps: int | None, run_dir: Path, redis_url: str | None, teacher: str, further: Sequence[str] = ()
) -> int:
    """Runs the whole demo with `further` settings of the trainer; returns the exit code."""
    console = Console(stderr=True)
    bundled = sorted(path.name for path in MODELS.iterdir() if path.is_dir())
    if teacher not in bundled or teacher == STUDENT:
        others = ", ".join(name for name in bundled if name != STUDENT)
        raise ConfigError(f"teacher={teacher}: is not bundled; choose one of {others}")
    set_aside(run_dir)
    try:
        with terminable():
            summary = distil(
                student=STUDENT, teacher=teacher, seed=seed, steps=steps, run_dir=run_dir, redis_url=redis_url,
                console=console, further=further,
            )  # fmt: skip
    except (KeyboardInterrupt, Terminated):
        console.print("stopped; everything that was started has ended")
        return _INTERRUPTED
    Console().print(summary_table(summary))
    Console().print(f"summary: {run_dir / 'summary.json'}   report: {run_dir / 'report.html'}", soft_wrap=True)
    return 0


def distil(
    *,
    student: str,
    teacher: str,
    seed: int,
    steps: int | None,
    run_dir: Path,
    redis_url: str | None,
    console: Console,
    further: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains `student` on `teacher` through a queue and returns the summary, which is written too."""
    begun = time.monotonic()
    stack_of = connected(run_dir, redis_url, teacher) if redis_url else launched(run_dir, teacher)
    with stack_of as stack:
        console.print(f"distilling [bold]{student}[/] from [bold]{teacher}[/], seed {seed}")
        train(stack, [*overrides(stack, student, seed, steps, run_dir), *further], CONFIG)
    trained = latest_checkpoint(run_dir)
    folders = {"before": MODELS / student, "after": trained, "teacher": MODELS / teacher}
    jobs = [(folder, sampling) for folder in folders.values() for sampling in (TEMPERATURE_ONE, PAPER)]
    found = evaluate_all(jobs, HELD_OUT, cache=run_dir.parent / "cache", console=console)
    scores = dict(zip(folders, zip(found[::2], found[1::2], strict=True), strict=True))
    summary = summarize(run_dir, scores, seed=seed, wall_seconds=time.monotonic() - begun)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_report([run_dir], run_dir / "report.html")
    return summary


def overrides(stack: Stack, student: str, seed: int, steps: int | None, run_dir: Path) -> list[str]:
    """What the launcher decides of the trainer's configuration."""
    values = [
        f"student.model={json.dumps(str(MODELS / student))}",
        f"teacher.pool={stack.pool}",
        f"teacher.url={json.dumps(stack.redis_url)}",
        f"data.files=[{json.dumps(str(TRAIN))}]",
        f"run_dir={json.dumps(str(run_dir))}",
        f"seed={seed}",
    ]
    if steps is None:
        return values
    return [*values, f"steps={steps}", f"optim.warmup_steps={min(_WARMUP_STEPS, steps)}"]


def summarize(
    run_dir: Path, scores: dict[str, tuple[Score, Score]], *, seed: int, wall_seconds: float
) -> dict[str, Any]:
    """One flat object: accuracies at temperature 1 (and, suffixed _t07, at the paper's sampling), recovery, metrics."""
    training = json.loads((run_dir / "train_summary.json").read_text(encoding="utf-8"))
    before, after, teacher = (scores[name][0] for name in ("before", "after", "teacher"))
    recovery = gap_recovery(*(np.array(score.accuracy_by_problem) for score in (before, after, teacher)), seed=seed)
    estimate = recovery.estimate
    summary: dict[str, Any] = {
        "student_accuracy_before": before.accuracy,
        "student_accuracy_after": after.accuracy,
        "teacher_accuracy": teacher.accuracy,
        "gap_recovery": estimate.value if estimate else None,
        "gap_recovery_interval": [estimate.low, estimate.high] if estimate else None,
    }
    for name, field in (
        ("before", "student_accuracy_before"),
        ("after", "student_accuracy_after"),
        ("teacher", "teacher_accuracy"),
    ):
        summary[f"{field}_t07"] = scores[name][1].accuracy
        summary[f"{field}_interval"] = [scores[name][0].low, scores[name][0].high]
    summary |= {
        "reverse_kl_first": training["reverse_kl_first"],
        "reverse_kl_last": training["reverse_kl_last"],
        "overlap_ratio_first": training["overlap_first"],
        "overlap_ratio_last": training["overlap_last"],
    }
    for name in ("steps", "rollouts_sent", "rollouts_scored", "rollouts_lost"):
        summary[name] = training[name]
    return summary | {"train_seconds": training["wall_seconds"], "wall_seconds": wall_seconds, "seed": seed}


def summary_table(summary: dict[str, Any]) -> Table:
    """What the demo prints."""
    table = Table(title=f"On-policy distillation, seed {summary['seed']}")
    for column, side in (("", "left"), ("before", "right"), ("after", "right"), ("teacher", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    fields = ("student_accuracy_before", "student_accuracy_after", "teacher_accuracy")
    table.add_row("accuracy, T 1.0", *(f"{summary[field]:.1%}" for field in fields))
    table.add_row("accuracy, T 0.7, top-p 0.95", *(f"{summary[f'{field}_t07']:.1%}" for field in fields))
    table.add_row("reverse KL", f"{summary['reverse_kl_first']:.4f}", f"{summary['reverse_kl_last']:.4f}", "")
    table.add_row("overlap ratio", f"{summary['overlap_ratio_first']:.1%}", f"{summary['overlap_ratio_last']:.1%}", "")
    if summary["gap_recovery"] is None:
        table.add_row("gap recovery", "", "no gap", "")
    else:
        low, high = summary["gap_recovery_interval"]
        table.add_row("gap recovery", "", f"{summary['gap_recovery']:.2f}", f"95 %: {low:.2f} to {high:.2f}")
    table.add_row(
        "rollouts", f"{summary['rollouts_sent']} sent", f"{summary['rollouts_scored']} scored",
        f"{summary['rollouts_lost']} lost",
    )  # fmt: skip
    table.add_row("steps, seconds", "", str(summary["steps"]), f"{summary['wall_seconds']:.0f}")
    return table


def set_aside(run_dir: Path) -> None:
    """An earlier demo's folder is kept once, as `<name>.previous`; a folder that is no demo's is refused."""
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    if not (run_dir / "logs").is_dir():
        raise ConfigError(f"run_dir={run_dir}: holds something that is no demo run; choose another folder")
    previous = run_dir.with_name(f"{run_dir.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    run_dir.rename(previous)
