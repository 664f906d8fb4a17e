"""One optimizer step on a CUDA device: tokens per second, model FLOP utilisation and peak memory.

`.venv/bin/python -m benchmarks.gpu_step` trains a model of random weights in the shape of Qwen3-1.7B (or 4B) on random
rollouts with 8,192 response tokens each: fp32 masters, bf16 layers, layers recomputed on the way back, clipping and
AdamW, by the very code of a run. Sampling and scoring are not part of it. Under `torchrun --nproc-per-node N -m
benchmarks.gpu_step` the student is in shards, and the rate is that of all devices. Without a CUDA device it says so and
measures nothing; `--device cpu --shape tiny --response 96` runs the same code on a CPU.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_score import PEAKS
from benchmarks.report import say, show

_BACKWARD = 3
"""Forward and backward passes in forward passes; what is recomputed is no useful work and does not count."""


def main() -> None:
    """Parses before anything heavy is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("1.7b", "4b", "tiny"), default="1.7b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--objective", choices=("top_k", "sampled_token"), default="top_k", help="sparse or dense head")
    parser.add_argument("--rollouts", type=int, default=8, help="of a step, for each device (default 8)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens (default 256)")
    parser.add_argument("--response", type=int, default=8192, help="tokens (default 8192)")
    parser.add_argument("--k", type=int, default=16, help="ids a position (default 16)")
    parser.add_argument("--micro-batch", type=int, default=16896, help="tokens of one pass (default 16896)")
    parser.add_argument("--steps", type=int, default=5, help="counted, after one that is not (default 5)")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measures, or says why not."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        say("no CUDA device here: nothing was measured")
        nothing = dict.fromkeys(("tokens_per_s", "mfu", "peak_bytes", "step_s"))
        show(["device"], [["none"]], nothing | {"reason": "no CUDA device"})
        return
    from benchmarks.gpu_training import GpuTraining
    from services.trainer.distributed.process_group import RankEnvironment, joined_ranks

    with joined_ranks(RankEnvironment.read(), device=args.device) as ranks:
        training = GpuTraining(args, ranks)
        seconds = []
        for number in range(args.steps + 1):
            training.synchronize()
            started = time.perf_counter()
            loss = training.step(number)
            training.synchronize()
            if number:
                seconds.append(time.perf_counter() - started)
            say(f"step {number} of {args.steps}: loss {loss:.4f}")
        _show(args, training, seconds, ranks.gather(training.peak_bytes()))


def _show(args: argparse.Namespace, training: Any, seconds: Sequence[float], peaks: Sequence[int | None]) -> None:
    from benchmarks.random_model import decoder_flops_per_token

    step_s = statistics.median(seconds)
    rate = training.num_tokens / step_s
    length = args.prompt + args.response
    flops = _BACKWARD * decoder_flops_per_token(training.shape, length)
    if args.objective == "sampled_token":
        flops += _BACKWARD * 2 * training.shape.hidden * training.shape.vocabulary * args.response / length
    limit = next((peak for name, peak in PEAKS.items() if name in training.device_name), None)
    mfu = rate * flops / (limit * training.num_ranks) if limit else None
    known = [peak for peak in peaks if peak is not None]
    result = {
        "device": training.device_name,
        "num_devices": training.num_ranks,
        "shape": args.shape,
        "objective": args.objective,
        "tokens_per_s": round(rate, 1),
        "mfu": mfu,
        "peak_bytes": max(known) if known else None,
        "step_s": step_s,
        "step_tokens": training.num_tokens,
        "response_tokens": args.response,
    }
    if training.rank == 0:
        memory = f"{max(known) / 2**30:.1f} GiB" if known else "unknown"
        row = [training.device_name, training.num_ranks, rate, step_s, mfu or "unknown", memory]
        show(["device", "devices", "tokens/s", "s/step", "FLOP utilisation", "peak memory"], [row], result)


if __name__ == "__main__":
    main()
