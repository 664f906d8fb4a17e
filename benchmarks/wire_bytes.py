"""What a scored response token costs on the wire, in bytes, beside JSON of the same content.

`.venv/bin/python -m benchmarks.wire_bytes` starts a Redis of its own and lets the real client and the real consumer
exchange rollouts of made-up scores. Counted are whole links with keys, commands and bookkeeping: the trainer's
(requests out, replies in), the teacher's, and by Redis's own counters what passes Redis, where every byte goes in and
out again. The result line gives the trainer's link as `k..._bytes_per_token`. Left out: connecting and loading scripts.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path

from benchmarks.report import say, show

MAX_BYTES_PER_TOKEN = {"float16": 112, "float32": 160}


def main() -> None:
    """Parses before anything heavy is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=64, help="of each case (default 64)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="default 64")
    parser.add_argument("--response-tokens", type=int, default=448, help="default 448, prompt to response 1:7")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="default 151936")
    parser.add_argument("--overlap", type=float, default=0.8, help="share of the top-k among the candidates")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 16, 64], help="default 1 4 16 64")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measures every case and prints table and result."""
    from benchmarks.wire_traffic import Shape, Traffic, as_plain, measure
    from opd.queue.embedded import EmbeddedRedis
    from opd.types import Encoding

    shape = Shape(
        num_rollouts=args.rollouts,
        num_prompt=args.prompt_tokens,
        num_response=args.response_tokens,
        vocabulary=args.vocabulary,
        overlap=args.overlap,
    )
    cases: list[Traffic] = []
    with tempfile.TemporaryDirectory(prefix="opd-wire-") as folder, EmbeddedRedis(Path(folder) / "redis") as redis:
        for k in args.k:
            for encoding in Encoding:
                say(f"k={k} {encoding}")
                cases.append(asyncio.run(measure(redis.url, Path(folder), shape, k, encoding)))
    header = ["k", "encoding", "trainer link", "teacher link", "redis in", "redis out", "redis sum", "JSON"]
    rows: list[list[object]] = []
    result: dict[str, object] = {"unit": "bytes per response token", "max_bytes_per_token": MAX_BYTES_PER_TOKEN}
    for case in cases:
        redis_sum = case.redis_in + case.redis_out
        numbers = (case.trainer_link, case.teacher_link, case.redis_in, case.redis_out, redis_sum, case.json)
        rows.append([case.k, case.encoding, *numbers, case.request_us, case.reply_us])
        result[f"k{case.k}_{case.encoding}_bytes_per_token"] = round(case.trainer_link, 2)
        result[f"k{case.k}_{case.encoding}_redis_sum_bytes_per_token"] = round(redis_sum, 2)
        result[f"k{case.k}_json_bytes_per_token"] = round(case.json, 1)
    show([*header, "request us", "reply us"], rows, result | {"cases": [as_plain(case) for case in cases]})


if __name__ == "__main__":
    main()
