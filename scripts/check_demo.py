"""Says whether a demo run holds what it promises; exit code 1 with one line for each promise that is broken."""

import json
import sys
from pathlib import Path

REQUIRED = (
    "student_accuracy_before", "student_accuracy_after", "teacher_accuracy", "gap_recovery", "gap_recovery_interval",
    "reverse_kl_first", "reverse_kl_last", "overlap_ratio_first", "overlap_ratio_last", "steps", "rollouts_sent",
    "rollouts_scored", "rollouts_lost", "wall_seconds", "seed",
)  # fmt: skip
MIN_GAP_RECOVERY = 0.5
MAX_KL_SHARE = 0.5


def broken_promises(run_dir: Path) -> list[str]:
    """One line for each; empty when all hold."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    broken = [f"summary.json has no {name}" for name in REQUIRED if summary.get(name) is None]
    if broken:
        return broken
    if summary["gap_recovery"] < MIN_GAP_RECOVERY:
        broken.append(f"gap_recovery {summary['gap_recovery']:.2f} is under {MIN_GAP_RECOVERY}")
    share = summary["reverse_kl_last"] / summary["reverse_kl_first"]
    if share > MAX_KL_SHARE:
        broken.append(f"reverse KL fell only to {share:.2f} of its start; {MAX_KL_SHARE} was promised")
    if summary["rollouts_lost"] or summary["rollouts_sent"] != summary["rollouts_scored"]:
        broken.append(f"{summary['rollouts_lost']} of {summary['rollouts_sent']} rollouts were lost")
    for name in ("metrics.jsonl", "report.html"):
        if not (run_dir / name).is_file():
            broken.append(f"{run_dir / name} was not written")
    return broken


def main() -> int:
    """Takes the run folder as its one argument."""
    broken = broken_promises(Path(sys.argv[1]))
    for line in broken:
        sys.stderr.write(f"check_demo: {line}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
