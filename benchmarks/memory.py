"""Peak memory, beyond weights and inputs, of scoring 4,096 rows over 151,936 columns: in chunks and with all logits.

`.venv/bin/python -m benchmarks.memory` runs each side in a process of its own and reads the high-water mark of its
resident memory, which is reset when weights and inputs are in place. Both sides answer the same: log-probs at 16
candidates and of the sampled token, top 16 and entropy.
"""

import argparse
import json
import subprocess
import sys

from benchmarks.peak_memory import HostMemory
from benchmarks.report import say, show

SIDES = ("engine", "naive")


def main() -> None:
    """Parses before anything heavy is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="response rows (default 4096)")
    parser.add_argument("--columns", type=int, default=151_936, help="rows of the output head (default 151,936)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (default 1024)")
    parser.add_argument("--quick", action="store_true", help="512 rows over 32,000 columns")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rows, args.columns = 512, 32_000
    if args.side:
        sys.stdout.write(json.dumps(_measure(args.side, args.rows, args.columns, args.hidden)))
        return
    found = {side: _in_a_process(side, args) for side in SIDES}
    rows = [[side, peak / 2**20, peak / (args.rows * 4)] for side, peak in found.items()]
    result = {"engine_peak_bytes": found["engine"], "naive_peak_bytes": found["naive"]}
    result |= {"rows": args.rows, "columns": args.columns, "logits_bytes": 4 * args.rows * args.columns}
    show(["side", "peak MiB", "fp32 numbers a row"], rows, result)


def _in_a_process(side: str, args: argparse.Namespace) -> int:
    say(f"{side}: {args.rows} rows over {args.columns} columns")
    sizes = ["--rows", str(args.rows), "--columns", str(args.columns), "--hidden", str(args.hidden)]
    command = [sys.executable, "-m", "benchmarks.memory", "--side", side, *sizes]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def _measure(side: str, num_rows: int, num_columns: int, num_hidden: int) -> int:
    import torch

    from opd.ops import OutputHead, score_rows

    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(num_rows, num_hidden, generator=generator)
    head = OutputHead(weight_VH=torch.randn(num_columns, num_hidden, generator=generator).mul_(0.05))
    ids_TK = torch.randint(0, num_columns, (num_rows, 16), generator=generator)

    def engine(rows_TH: torch.Tensor, ids_TK: torch.Tensor) -> None:
        score_rows(
            rows_TH, head, num_defined_ids=num_columns, sampled_ids_T=ids_TK[:, 0], candidate_ids_TK=ids_TK,
            score_top_k=16, wants_entropy=True,
        )  # fmt: skip

    def naive(rows_TH: torch.Tensor, ids_TK: torch.Tensor) -> None:
        logprobs_TV = torch.log_softmax(rows_TH @ head.weight_VH.T, dim=-1)
        logprobs_TV.gather(-1, ids_TK)
        logprobs_TV.topk(16)
        -(logprobs_TV.exp() * logprobs_TV).sum(-1)

    score = engine if side == "engine" else naive
    # What the libraries keep for themselves is there before it counts.
    score(hidden_TH[:8], ids_TK[:8])
    memory = HostMemory()
    memory.begin()
    score(hidden_TH, ids_TK)
    return memory.peak_bytes()


if __name__ == "__main__":
    main()
