"""`python -m services.teacher_server model=PATH redis_url=URL`: the same as `opd teacher serve`."""

import argparse
import sys
from pathlib import Path

from opd.errors import ConfigError, OpdError
from opd.logs import give_up


def main() -> int:
    """Parses, serves, and turns what the user got wrong into one line and an exit code."""
    parser = argparse.ArgumentParser(prog="python -m services.teacher_server")
    parser.add_argument("overrides", nargs="*", metavar="name.part=value")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--ready-file", type=Path)
    arguments = parser.parse_args()
    try:
        from services.teacher_server.server import run_teacher

        return run_teacher(arguments.config, arguments.overrides, arguments.ready_file)
    except OpdError as error:
        give_up("opd", error)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
