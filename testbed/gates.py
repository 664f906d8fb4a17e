"""Whether the testbed is shaped as it claims: real distillation runs over three seeds, and which gates held.

Each run goes through the whole stack, as the demo does, into a folder of its own; a run that is there already is not
repeated. A gate that fails is reported like one that holds.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from testbed.demo import HELD_OUT, distil
from testbed.scores import remember
from testbed.stack import MODELS

SEEDS = (0, 1, 2)
PAIRS = {
    "post": ("student-base", "teacher-post", None),
    "big": ("student-base", "teacher-big", None),
    # Where these end is the question, and after the demo's 24 steps both are still on their way.
    "back-to-base": ("teacher-post", "student-base", 80),
    "back-to-big": ("teacher-post", "teacher-big", 80),
    "other": ("student-base", "teacher-other", 3),
}
"""Name -> student, teacher, steps (None: the demo's)."""
MIN_RECOVERY = 0.5
MAX_GAIN_SHARE = 1 / 3
MAX_LEVEL_DIFFERENCE = 0.05
REPORT = Path(__file__).with_name("gates.json")

Run = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """One claim, what was seen for each seed, and whether it holds for all of them."""

    claim: str
    seen: tuple[float, ...]
    bound: str
    held: bool


def run_gates(work_dir: Path, console: Console, seeds: Sequence[int] = SEEDS) -> list[Gate]:
    """Makes the runs that are missing, judges all of them, writes `testbed/gates.json`."""
    runs = {name: [_run(name, seed, work_dir, console) for seed in seeds] for name in PAIRS}
    gates = judge(runs)
    report = {"seeds": list(seeds), "gates": [asdict(gate) for gate in gates], "runs": runs}
    REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(gates_table(gates))
    return gates


def judge(runs: dict[str, list[Run]]) -> list[Gate]:
    """The gates over the runs of all seeds."""
    recoveries = tuple(run["gap_recovery"] or 0.0 for run in runs["post"])
    shares = tuple(_gain(big) / _gain(post) for big, post in zip(runs["big"], runs["post"], strict=True))
    differences = tuple(
        abs(base["student_accuracy_after"] - big["student_accuracy_after"])
        for base, big in zip(runs["back-to-base"], runs["back-to-big"], strict=True)
    )
    masses = tuple(
        other["overlap_mass_first"] - post["overlap_mass_first"]
        for other, post in zip(runs["other"], runs["post"], strict=True)
    )
    return [
        Gate(
            claim="gap recovery from teacher-post",
            seen=recoveries,
            bound=f">= {MIN_RECOVERY}",
            held=min(recoveries) >= MIN_RECOVERY,
        ),
        Gate(
            claim="accuracy gain from teacher-big as a share of that from teacher-post",
            seen=shares,
            bound=f"<= {MAX_GAIN_SHARE:.2f}",
            held=max(shares) <= MAX_GAIN_SHARE,
        ),
        Gate(
            claim="teacher-post distilled back from student-base and from teacher-big: difference in accuracy",
            seen=differences,
            bound=f"<= {MAX_LEVEL_DIFFERENCE}",
            held=mean(differences) <= MAX_LEVEL_DIFFERENCE,
        ),
        Gate(
            claim="overlap mass at the first step, teacher-other minus teacher-post",
            seen=masses,
            bound="< 0",
            held=max(masses) < 0,
        ),
    ]


def gates_table(gates: Sequence[Gate]) -> Table:
    """One line a gate."""
    table = Table(title="Gates of the testbed")
    for column in ("claim", "seen", "bound", "held"):
        table.add_column(column)
    for gate in gates:
        seen = ", ".join(f"{value:.3f}" for value in gate.seen)
        table.add_row(gate.claim, seen, gate.bound, "yes" if gate.held else "NO")
    return table


def _gain(run: Run) -> float:
    gain: float = run["student_accuracy_after"] - run["student_accuracy_before"]
    return gain


def _run(name: str, seed: int, work_dir: Path, console: Console) -> Run:
    """The summary of one run, with the overlap mass it began with."""
    student, teacher, steps = PAIRS[name]
    run_dir = work_dir / f"{name}-{seed}"
    summary_file = run_dir / "summary.json"
    if summary_file.is_file():
        summary: Run = json.loads(summary_file.read_text(encoding="utf-8"))
    else:
        summary = distil(
            student=student, teacher=teacher, seed=seed, steps=steps, run_dir=run_dir, redis_url=None, console=console
        )
    with (run_dir / "metrics.jsonl").open(encoding="utf-8") as lines:
        first = json.loads(next(lines))
    masses = (first["distill/overlap_mass_student"], first["distill/overlap_mass_teacher"])
    return summary | {"overlap_mass_first": mean(masses)}


def main() -> None:
    """`python -m testbed.gates`: takes an hour on a laptop; finished runs in `runs/gates` are kept."""
    console = Console(stderr=True)
    models = sorted(path for path in MODELS.iterdir() if path.is_dir())
    remember(models, HELD_OUT, cache=Path("runs/cache"), console=console)
    run_gates(Path("runs/gates"), console)


if __name__ == "__main__":
    main()
