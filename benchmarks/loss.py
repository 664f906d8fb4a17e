"""Time and memory of one loss over a large vocabulary, forward and backward, by four ways of running the output head.

`.venv/bin/python -m benchmarks.loss`. The loss is the exact reverse KL renormalised on 16 ids a position; gradients go
to hidden states and to the head's weight.
- sparse: the head at the support's ids alone (what the trainer does where no term needs a normaliser)
- sparse_with_support: the same after a pass without gradient that chooses the ids, top-k over all columns
- chunked: log-probs over all columns, 256 rows at a time, recomputed on the way back
- naive: log-probs of all rows at once; null above 4,096 positions, whose logits would not fit
Each side runs in a process of its own, and the sides take turns, so that a busy machine is busy for all of them; the
least time counts. Memory is the peak beyond weight, hidden states and their gradients. The keys of the last line are of
the size named by `positions`; `sizes` has all of them.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.peak_memory import HostMemory
from benchmarks.report import say, show

SIDES = ("sparse", "sparse_with_support", "chunked", "naive")
MAX_NAIVE_POSITIONS = 4096
STATED_POSITIONS = 4096
_SUPPORT = 16
_ROUNDS = 3
_TIMED_RUNS = 3
"""Of a process."""
_LONG_S = 20.0
"""What takes longer is run once."""


def main() -> None:
    """Parses before anything heavy is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 4096, 32768], help="rows, one run each")
    parser.add_argument("--columns", type=int, default=151_936, help="rows of the output head (default 151,936)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (default 1024)")
    parser.add_argument("--quick", action="store_true", help="512 positions over 32,000 columns")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--side", choices=(*SIDES, "error"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.positions, args.columns = [512], 32_000
    if args.side:
        sys.stdout.write(json.dumps(_gradient_error(args) if args.side == "error" else _measure(args)))
        return
    sizes = {positions: _size(positions, args) for positions in args.positions}
    stated = STATED_POSITIONS if STATED_POSITIONS in sizes else args.positions[-1]
    rows = [
        [positions, side, found[f"{side}_s"], _mebibytes(found[f"{side}_peak_bytes"])]
        for positions, found in sizes.items()
        for side in SIDES
    ]
    result = {"positions": stated, **sizes[stated], "gradient_error": _in_a_process("error", stated, args)}
    result |= {"columns": args.columns, "hidden": args.hidden, "support": _SUPPORT, "sizes": sizes}
    show(["positions", "side", "seconds", "peak MiB"], rows, result)


def _size(positions: int, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sides = [side for side in SIDES if side != "naive" or positions <= MAX_NAIVE_POSITIONS]
    if "naive" not in sides:
        reason = f"logits of {positions} rows alone take {4 * positions * args.columns / 2**30:.0f} GiB, thrice"
        found |= {"naive_s": None, "naive_peak_bytes": None, "naive_reason": reason}
    for turn in range(_ROUNDS):
        for side in sides:
            name = f"{side}_s"
            if turn and found[name] > _LONG_S:
                continue
            say(f"{side}: {positions} positions over {args.columns} columns, turn {turn + 1}")
            seconds, peak = _in_a_process(side, positions, args)
            found |= {name: min(seconds, found.get(name, seconds))}
            found.setdefault(f"{side}_peak_bytes", peak)
    return found


def _in_a_process(side: str, positions: int, args: argparse.Namespace) -> Any:
    options = {"--side": side, "--positions": positions, "--columns": args.columns, "--hidden": args.hidden}
    words = [str(word) for pair in (options | {"--device": args.device}).items() for word in pair]
    command = [sys.executable, "-m", "benchmarks.loss", *words]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _measure(args: argparse.Namespace) -> tuple[float, int]:
    """Seconds, least of some runs (one where a run is long), and the peak of the first run in bytes."""
    step, gradients = _step(args, args.side, args.positions[0])
    warm, _ = _step(args, args.side, 8)
    warm()
    memory = _CudaMemory() if args.device == "cuda" else HostMemory()
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) < _TIMED_RUNS and (not seconds or time.perf_counter() - begun < _LONG_S):
        if not seconds:
            memory.begin()
        started = time.perf_counter()
        step()
        memory.settle()
        seconds.append(time.perf_counter() - started)
        if len(seconds) == 1:
            peak = memory.peak_bytes() - sum(tensor.grad.nbytes for tensor in gradients())
        for tensor in gradients():
            tensor.grad = None
    return min(seconds), max(peak, 0)


def _gradient_error(args: argparse.Namespace) -> float:
    """How far the sparse gradients are from the chunked ones, by norm, relative."""
    found = []
    for side in ("sparse", "chunked"):
        step, gradients = _step(args, side, args.positions[0])
        step()
        found.append([tensor.grad for tensor in gradients()])
    error = sum(float((one - other).double().square().sum()) for one, other in zip(*found, strict=True))
    return float((error / sum(float(other.double().square().sum()) for other in found[1])) ** 0.5)


def _step(args: argparse.Namespace, side: str, num_rows: int) -> tuple[Callable[[], None], Callable[[], list[Any]]]:
    """One forward and backward pass of a side, and the tensors that have gradients after it."""
    import torch

    from opd.ops import OutputHead, score_rows, student_scores, support_logits
    from services.trainer.objectives.top_k import exact_divergence

    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(args.columns, args.hidden, generator=generator).mul_(0.05).to(args.device)
    hidden_TH = torch.randn(num_rows, args.hidden, generator=generator).to(args.device).requires_grad_()
    head = OutputHead(weight_VH=weight_VH.requires_grad_())
    ids_TK = _support_ids(generator, num_rows, args.columns).to(args.device)
    teacher_TK = torch.randn(num_rows, _SUPPORT, generator=generator).log_softmax(dim=-1).to(args.device)
    mask_TK = torch.ones_like(ids_TK, dtype=torch.bool)

    def logits() -> Any:
        if side == "naive":
            return torch.log_softmax(hidden_TH @ weight_VH.T, dim=-1).gather(-1, ids_TK)
        if side == "chunked":
            return student_scores(hidden_TH, head, ids_TK, num_defined_ids=args.columns).logprobs_TK
        if side == "sparse_with_support":
            chosen = score_rows(hidden_TH, head, num_defined_ids=args.columns, score_top_k=_SUPPORT)
            assert chosen.topk_ids_Tk is not None
            return support_logits(hidden_TH, head, chosen.topk_ids_Tk, num_defined_ids=args.columns)
        return support_logits(hidden_TH, head, ids_TK, num_defined_ids=args.columns)

    def step() -> None:
        (exact_divergence(logits(), teacher_TK, mask_TK).sum() / num_rows).backward()

    return step, lambda: [hidden_TH, weight_VH]


def _support_ids(generator: Any, num_rows: int, num_columns: int) -> Any:
    """[T, K] distinct ids in each row, the small ones more often, as token ids are by their frequency."""
    import torch

    columns_K = torch.arange(_SUPPORT)
    strata_TK = (columns_K + torch.rand(num_rows, _SUPPORT, generator=generator)) / _SUPPORT
    # Never falling along a row, so that adding the column's number leaves no two alike.
    return ((num_columns - _SUPPORT) ** strata_TK).long() - 1 + columns_K


class _CudaMemory:
    """What torch's allocator has given out at most."""

    def begin(self) -> None:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def settle(self) -> None:
        import torch

        torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() - self._before


def _mebibytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


if __name__ == "__main__":
    main()
