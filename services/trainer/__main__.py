"""`python -m services.trainer [--config FILE] [--resume] name.part=value ...`: training without the `opd` command."""

import argparse
from pathlib import Path

from services.trainer.run import end_process, run_training


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.trainer", description="Distils a student from a pool.")
    parser.add_argument("--config", type=Path, help="TOML file")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of run_dir")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, e.g. optim.lr=3e-4")
    arguments = parser.parse_args()
    return run_training(arguments.config, arguments.overrides, resume=arguments.resume)


if __name__ == "__main__":
    end_process(main())
