"""What the files of deploy/prometheus, deploy/grafana and docs say, read once for the tests about them."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
PROMETHEUS = ROOT / "deploy/prometheus"
RULE_FILES = sorted((PROMETHEUS / "rules").glob("*.yml"))
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
_METRIC_ROW = re.compile(r"^\| `(opd_\w+)` \| (\w+) \|([^|]*)\|", re.MULTILINE)


def documented_metrics() -> dict[str, tuple[str, frozenset[str]]]:
    """Type and labels by name, from docs/operations.md."""
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    rows = _METRIC_ROW.findall(text)
    found = {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(found) == len(rows) > 80, "a metric stands twice in docs/operations.md"
    return found


def rules() -> list[dict[str, Any]]:
    """Every rule of every file."""
    groups = [group for path in RULE_FILES for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def dashboard_expressions() -> list[str]:
    return [
        target["expr"]
        for path in DASHBOARDS
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]
        for target in panel.get("targets", ())
    ]


def find_tool(name: str) -> str:
    """A program of Debian's prometheus package: skipped without it, and a failure under CI=true."""
    path = shutil.which(name)
    if path is not None:
        return path
    message = f"{name}: is not here; install Debian's package prometheus"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
