"""A training step here and in TRL: same student, teacher, prompts, sampling, optimizer and cores, side by side.

`.venv/bin/python -m benchmarks.peer_step` trains the bundled student on the bundled teacher with
`trl.DistillationTrainer` (beta 1, the reverse KL over the whole vocabulary, teacher in process), which
`scripts/setup_peer.sh` puts into `.venv-peer`, and with this project's services (Redis, teacher process, trainer
process, `objective.kind=top_k`), in turn, several rounds over. All processes of a side share the same cores. A step
lasts from the end of one to the end of the next, with whatever a side does in between. `score` is the teacher's forward
pass at TRL, and here the time in which a step can only wait for scores. On TRL's first rollouts both
losses are computed: a sum over response tokens divided by their number, on either side.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import say, show

if TYPE_CHECKING:
    from benchmarks.peer_plan import Plan

MIN_TIMES_TRL = 1.5
_PARTS = ("generate_s", "score_s", "update_s", "step_s")
_TRL_S = 3600.0


def main() -> None:
    """Parses before anything heavy is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="of one step (default 64)")
    parser.add_argument("--rollouts", type=int, default=4, help="of each prompt (default 4)")
    parser.add_argument("--max-response-tokens", type=int, default=320, help="then a response is cut off (default 320)")
    parser.add_argument("--steps", type=int, default=5, help="that count, after one that does not (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="of both sides in turn (default 3)")
    parser.add_argument("--cores", type=int, default=2, help="of each side, all its processes together (default 2)")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="of our passes (default 4096)")
    parser.add_argument("--trl-batch", type=int, default=64, help="rollouts of one of TRL's passes (default 64)")
    parser.add_argument("--venv", type=Path, default=Path(".venv-peer"), help="virtual environment with TRL")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of our trainer")
    parser.add_argument("--quick", action="store_true", help="one round of one step with 16 rollouts")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.rollouts, args.steps, args.rounds, args.trl_batch = 4, 4, 1, 1, 16
    if args.prompts * args.rollouts % args.trl_batch:
        parser.error(f"--trl-batch {args.trl_batch}: does not divide the {args.prompts * args.rollouts} rollouts")
    run(args)


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table and the result."""
    cores = _keep_to(args.cores)
    from benchmarks.peer_ours import OurSide
    from benchmarks.peer_plan import Plan

    plan = Plan(
        prompts_per_step=args.prompts,
        rollouts_per_prompt=args.rollouts,
        steps=args.steps + 1,
        max_response_tokens=args.max_response_tokens,
        cores=cores,
        micro_batch_tokens=args.micro_batch_tokens,
        trl_batch=args.trl_batch,
        further=tuple(args.set),
    )
    reason = why_no_trl(args.venv)
    begun = time.monotonic()
    ours: list[list[dict[str, float]]] = []
    trl: list[dict[str, Any]] = []
    first: tuple[float, float] | None = None
    with tempfile.TemporaryDirectory() as name, OurSide(plan, Path(name)) as side:
        plan.write_for_trl(Path(name) / "plan.json")
        for number in range(args.rounds):
            if reason is None:
                trl.append(_train_with_trl(args.venv, Path(name), cores))
                _tell(number, "trl", _counted(trl[-1]["steps"]))
            ours.append(side.train())
            _tell(number, "ours", ours[-1])
        if trl:
            first = side.first_loss(trl[0]["first_prompts"], trl[0]["first_responses"])
    result = _result(ours, trl, first, reason) | _circumstances(plan, trl, args, time.monotonic() - begun)
    _show(result)


def why_no_trl(venv: Path) -> str | None:
    """Why that side cannot be measured; None when it can."""
    if not (venv / "bin" / "python").is_file():
        return f"{venv} is not there: scripts/setup_peer.sh makes it"
    return None


def _keep_to(num_cores: int) -> int:
    """Binds this process, and so all that it starts, to so many cores; returns how many there are."""
    allowed = sorted(os.sched_getaffinity(0))[:num_cores]
    os.sched_setaffinity(0, allowed)
    return len(allowed)


def _train_with_trl(venv: Path, folder: Path, cores: int) -> dict[str, Any]:
    """One run in a process of its own, with as many threads as there are cores."""
    log = folder / "trl.log"
    command = [str(venv.absolute() / "bin" / "python"), "-m", "benchmarks.peer_trl"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    with log.open("wb") as stream:
        done = subprocess.run(
            [*command, str(folder / "plan.json"), str(folder / "trl.json")],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment, timeout=_TRL_S,
            check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"TRL ended with code {done.returncode}:\n{log.read_text(errors='replace')[-2000:]}")
    found: dict[str, Any] = json.loads((folder / "trl.json").read_text(encoding="utf-8"))
    return found


def _counted(steps: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Without the first step, which warms up; what a step did beside generating and scoring is its update."""
    return [{**step, "update_s": step["step_s"] - step["generate_s"] - step["score_s"]} for step in steps[1:]]


def _tell(number: int, side: str, steps: Sequence[Mapping[str, float]]) -> None:
    parts = ", ".join(f"{part.removesuffix('_s')} {_mean(steps, part):.2f} s" for part in _PARTS)
    say(f"round {number + 1}: {side}: {parts}")


def _mean(steps: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(step[name] for step in steps) / len(steps)


def _median(rounds: Sequence[Sequence[Mapping[str, float]]], name: str) -> float:
    """Over rounds, of their means over steps."""
    return statistics.median(_mean(steps, name) for steps in rounds)


def _side(name: str, rounds: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    result = {f"{name}_steps_per_s": round(1 / _median(rounds, "step_s"), 4)}
    result |= {f"{name}_{part}": round(_median(rounds, part), 4) for part in _PARTS}
    return result | {f"{name}_response_tokens": round(_median(rounds, "num_tokens"), 1)}


def _result(
    ours: Sequence[Sequence[Mapping[str, float]]],
    trl: Sequence[Mapping[str, Any]],
    first: tuple[float, float] | None,
    reason: str | None,
) -> dict[str, Any]:
    result: dict[str, Any] = _side("ours", ours)
    if first is None:
        names = ("steps_per_s", *_PARTS, "response_tokens")
        absent = {f"trl_{name}": None for name in names} | {"times_trl": None, "first_loss_difference": None}
        return result | absent | {"trl_reason": reason}
    rounds = [_counted(run["steps"]) for run in trl]
    ratios = [_mean(theirs, "step_s") / _mean(own, "step_s") for theirs, own in zip(rounds, ours, strict=True)]
    theirs = trl[0]["steps"][0]
    return (
        result
        | _side("trl", rounds)
        | {
            "times_trl": round(statistics.median(ratios), 3),
            "times_trl_by_round": [round(ratio, 3) for ratio in ratios],
            "first_loss_ours": first[0],
            "first_loss_trl": theirs["loss"],
            "first_loss_difference": abs(first[0] - theirs["loss"]),
            "first_grad_norm_ours": first[1],
            "first_grad_norm_trl": theirs.get("grad_norm"),
            "loss_reduction": "sum over response tokens / number of response tokens, both sides",
        }
    )


def _circumstances(
    plan: "Plan", trl: Sequence[Mapping[str, Any]], args: argparse.Namespace, wall_s: float
) -> dict[str, Any]:
    return {
        "prompts_per_step": plan.prompts_per_step,
        "rollouts_per_prompt": plan.rollouts_per_prompt,
        "max_response_tokens": plan.max_response_tokens,
        "steps": args.steps,
        "rounds": args.rounds,
        "cores": plan.cores,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "trl_batch": plan.trl_batch,
        "settings": list(plan.further),
        "our_versions": {name: version(name) for name in ("torch", "transformers")},
        "trl_versions": trl[0]["versions"] if trl else None,
        "wall_s": round(wall_s, 1),
    }


def _show(result: Mapping[str, Any]) -> None:
    names = ("steps_per_s", *_PARTS, "response_tokens")
    rows = [[side, *(result[f"{side}_{name}"] for name in names)] for side in ("ours", "trl")]
    if result["times_trl"] is not None:
        held = result["times_trl"] >= MIN_TIMES_TRL
        say(f"at least {MIN_TIMES_TRL} times TRL's steps per second: {'yes' if held else 'NO'}")
    show(["side", *names], rows, result)


if __name__ == "__main__":
    main()
