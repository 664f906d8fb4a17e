"""Run inside an image: what is installed there and neither imported by a process nor needed by what is.

Standard input is what `python -X importtime` said of the process. Prints a JSON list. Standard library alone.
"""

import json
import re
import sys
from importlib import metadata


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needs(name: str) -> set[str]:
    """What a distribution asks for, its extras left out."""
    lines = [line for line in metadata.requires(name) or () if "extra ==" not in line.partition(";")[2]]
    return {canonical(re.split(r"[^A-Za-z0-9._-]", line.strip())[0]) for line in lines}


def unused(import_times: str) -> list[str]:
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in import_times.splitlines() if "|" in line}
    installed = {canonical(found.metadata["Name"]) for found in metadata.distributions()}
    holders = metadata.packages_distributions()
    wanted: set[str] = set()
    todo = {canonical(found) for module in modules for found in holders.get(module, ())}
    while todo:
        wanted |= todo
        todo = {needed for name in todo for needed in needs(name)} & installed - wanted
    return sorted(installed - wanted)


if __name__ == "__main__":
    print(json.dumps(unused(sys.stdin.read())))  # noqa: T201
