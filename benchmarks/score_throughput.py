"""Response tokens scored per second: the bare model, our engine, our engine through gRPC and through Redis, and vLLM.

`.venv/bin/python -m benchmarks.score_throughput` builds a model of random weights (hidden 512, 8 layers, vocabulary
32,000, fp32) and gives every side the same load of distinct prompts in turn, several rounds over; medians are compared.
The floor is what any scorer must pay: a forward pass over prompts and responses, and the output head at the response
rows. All sides compute with the same number of threads. vLLM is its OpenAI-compatible server, asked for
prompt_logprobs=16, where its virtual environment is (`make test-vllm` makes it).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.report import say, show

Side = Callable[[str], int]
"""Scores a load that is new for each name; returns its response tokens."""
MIN_SHARE_OF_FLOOR = 0.85
MIN_TIMES_VLLM = 1.5


def main() -> None:
    """Parses before anything heavy is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=2, help="of 16 sequences, in one round (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="of all sides in turn (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="of every side's tensor library (default 2)")
    parser.add_argument("--vllm", type=Path, default=Path(".venv-vllm"), help="virtual environment with vLLM")
    parser.add_argument("--quick", action="store_true", help="one round of one batch, without vLLM")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.rounds, args.vllm = 1, 1, None
    run(args)


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table and the result."""
    from benchmarks.throughput_sides import Sides
    from benchmarks.throughput_vllm import VllmServer, why_no_vllm

    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        ours = opened.enter_context(Sides(folder, args.batches, args.threads))
        sides: dict[str, Side] = dict(ours.sides())
        reason = why_no_vllm(args.vllm)
        if reason is None:
            vllm = opened.enter_context(VllmServer(args.vllm, ours.model_folder, folder, args.threads))
            sides["vllm_http"] = lambda name: vllm.score(ours.load(name))
        rates = _measure(sides, args.rounds)
        gains = ours.shared_prefix_gains()
    _show(rates, gains, reason, args)


def _measure(sides: Mapping[str, Side], num_rounds: int) -> dict[str, list[float]]:
    """Tokens per second by side and round; a round that is not counted warms all of them up."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(num_rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            num_tokens = side(f"{name}{number}")
            rate = num_tokens / (time.perf_counter() - started)
            say(f"round {number} of {num_rounds}: {name} {rate:.0f} tokens/s{'' if number else ' (not counted)'}")
            if number:
                rates[name].append(rate)
    return rates


def _show(
    rates: Mapping[str, list[float]], gains: dict[str, float], reason: str | None, args: argparse.Namespace
) -> None:
    medians = {name: statistics.median(found) for name, found in rates.items()}
    floor = medians["floor"]
    result: dict[str, Any] = {f"{name}_tokens_per_s": round(rate, 1) for name, rate in medians.items()}
    result |= {"redis_share_of_floor": round(medians["redis"] / floor, 3), "threads": args.threads, **gains}
    if reason is None:
        result["redis_times_vllm"] = round(medians["redis"] / medians["vllm_http"], 2)
    else:
        result |= {"vllm_http_tokens_per_s": None, "vllm_http_reason": reason}
    rows = [
        [name, rate, rate / floor, f"{min(rates[name]):.0f} to {max(rates[name]):.0f}"]
        for name, rate in medians.items()
    ]
    held = result["redis_share_of_floor"] >= MIN_SHARE_OF_FLOOR
    say(f"through Redis at least {MIN_SHARE_OF_FLOOR} of the floor: {'yes' if held else 'NO'}")
    if reason is None:
        say(f"at least {MIN_TIMES_VLLM} times vLLM: {'yes' if result['redis_times_vllm'] >= MIN_TIMES_VLLM else 'NO'}")
    show(["side", "tokens/s", "of the floor", "rounds"], rows, result)


if __name__ == "__main__":
    main()
