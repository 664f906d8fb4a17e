"""Scoring on a CUDA device: tokens per second and model FLOP utilisation, beside the bare forward pass.

`.venv/bin/python -m benchmarks.gpu_score` builds a model of random weights in the shape of Qwen3-1.7B (or 4B) in bf16,
checks a slice of the scores against float64, and times the engine and, alternating with it, the bare decoder with the
output head at the response rows. Without a CUDA device it says so and measures nothing; `--device cpu --shape tiny`
runs the same code on a CPU.
"""

import argparse
import statistics
import time
from typing import Any

from benchmarks.report import say, show

# Dense bf16 peaks as their makers state them, in FLOP per second.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
TOLERANCE = 2e-5


def main() -> None:
    """Parses before anything heavy is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("1.7b", "4b", "tiny"), default="1.7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequences", type=int, default=32, help="of one load (default 32)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens (default 256)")
    parser.add_argument("--response", type=int, default=1792, help="tokens (default 1792)")
    parser.add_argument("--k", type=int, default=16, help="candidates and teacher top-k (default 16)")
    parser.add_argument("--rounds", type=int, default=5, help="counted, after one that is not (default 5)")
    args = parser.parse_args()
    run(args)


def run(args: argparse.Namespace) -> None:
    """Measures, or says why not."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        say("no CUDA device here: nothing was measured")
        show(["device"], [["none"]], {"tokens_per_s": None, "mfu": None, "reason": "no CUDA device"})
        return
    from benchmarks.gpu_sides import GpuSides

    sides = GpuSides(args)
    error = sides.largest_error()
    say(f"a slice of the scores is within {error:.2g} of float64{'' if error <= TOLERANCE else ', which is TOO MUCH'}")
    rates: dict[str, list[float]] = {"floor": [], "engine": []}
    for number in range(args.rounds + 1):
        for name, side in (("floor", sides.floor), ("engine", sides.engine)):
            sides.synchronize()
            started = time.perf_counter()
            num_tokens = side()
            sides.synchronize()
            if number:
                rates[name].append(num_tokens / (time.perf_counter() - started))
        say(f"round {number} of {args.rounds}")
    _show(sides, {name: statistics.median(found) for name, found in rates.items()}, error)


def _show(sides: Any, medians: dict[str, float], error: float) -> None:
    peak = next((flops for name, flops in PEAKS.items() if name in sides.device_name), None)
    used = {name: rate * sides.flops_per_token / peak if peak else None for name, rate in medians.items()}
    result = {
        "device": sides.device_name,
        "shape": sides.shape_name,
        "tokens_per_s": round(medians["engine"]),
        "floor_tokens_per_s": round(medians["floor"]),
        "share_of_floor": round(medians["engine"] / medians["floor"], 3),
        "mfu": used["engine"],
        "floor_mfu": used["floor"],
        "largest_error": error,
        "peak_bytes": sides.peak_bytes(),
    }
    rows = [[name, rate, rate / medians["floor"], used[name] or "unknown"] for name, rate in medians.items()]
    show(["side", "tokens/s", "of the floor", "FLOP utilisation"], rows, result)


if __name__ == "__main__":
    main()
