"""What float16 log-probs do to loss, gradient and metrics, beside what another batch does to them.

`.venv/bin/python -m benchmarks.float16_effect` takes the bundled student through a few steps towards the bundled
teacher, once on float32 and once on float16 scores, and compares at the start, at the end of both, and in the limit,
where the student is the teacher and only rounding is left of the loss. What follows from the result stands in
`docs/decisions/0006-bytes-on-the-wire.md`.
"""

import argparse
from dataclasses import asdict
from typing import Any

from benchmarks.report import say, show


def main() -> None:
    """Parses before anything heavy is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="student-base", help="folder in testbed/models")
    parser.add_argument("--teacher", default="teacher-post", help="folder in testbed/models")
    parser.add_argument("--k", type=int, default=16, help="of student and teacher (default 16)")
    parser.add_argument("--prompts", type=int, default=16, help="of a batch (default 16)")
    parser.add_argument("--samples", type=int, default=4, help="of each prompt (default 4)")
    parser.add_argument("--steps", type=int, default=24, help="between start and second comparison (default 24)")
    parser.add_argument("--seed", type=int, default=0)
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Compares at the three places and prints table and result."""
    from benchmarks.float16_study import Study, metric_shifts, objectives, value_errors
    from opd.types import Encoding

    sizes = {"k": args.k, "num_prompts": args.prompts, "num_samples": args.samples, "seed": args.seed}
    comparisons, shifts, errors = [], [], {}

    def look(study: Study, state: str) -> None:
        say(state)
        first, second = study.batch(1000), study.batch(1001)
        comparisons.extend(study.compare(state, first, second))
        shifts.extend(metric_shifts(state, first, second))
        errors[state] = value_errors(first) | {"positions": first.num_positions}

    for encoding in Encoding:
        study = Study(student=args.student, teacher=args.teacher, **sizes)
        if encoding is Encoding.FLOAT32:
            look(study, "start")
        study.train(objectives(args.k)["top_k exact"], args.steps, encoding, say)
        look(study, f"{args.steps} steps on {encoding}")
    look(Study(student=args.teacher, teacher=args.teacher, **sizes), "student = teacher")
    for shift in shifts:
        changes = f"float16 {shift.float16:.2g}, other batch {shift.other_batch:.2g}"
        say(f"{shift.state}: {shift.metric} {shift.value:.4g}, {changes}")
    header = ["student", "objective", "loss", "its shift", "grad norm", "its error", "relative", "of batch noise"]
    rows = [
        [
            found.state,
            found.objective,
            found.loss,
            found.loss_shift,
            found.grad_norm,
            found.grad_error,
            found.relative_grad_error,
            found.share_of_batch_noise,
        ]
        for found in comparisons
    ]
    result = {
        "comparisons": [_plain(found) for found in comparisons],
        "metrics": [_plain(shift) for shift in shifts],
        "values": errors,
    }
    show(header, rows, result)


def _plain(record: Any) -> dict[str, object]:
    """For JSON, which knows no NaN."""
    return {name: None if value != value else value for name, value in asdict(record).items()}


if __name__ == "__main__":
    main()
