"""Rules, dashboard, metrics list and runbook name the same things, and promtool finds nothing wrong with them."""

import json
import re
import subprocess

import yaml

from opd.errors import known_codes
from services.teacher_server.http_gate import STATUS as HTTP_STATUS
from tests.unit.deploy.monitoring import (
    DASHBOARDS,
    PROMETHEUS,
    ROOT,
    RULE_FILES,
    alerts,
    dashboard_expressions,
    documented_metrics,
    find_tool,
    rules,
)

HISTOGRAM_PARTS = ("_bucket", "_sum", "_count")
RECORDED = re.compile(r"\b(?:tenant|instance|teacher):\w+:\w+\b")


def promtool(*arguments: str) -> None:
    done = subprocess.run([find_tool("promtool"), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    promtool("check", "rules", *map(str, RULE_FILES))
    # The token's file is there in a container alone.
    promtool("check", "config", "--syntax-only", str(PROMETHEUS / "prometheus.yml"))


def test_every_rule_does_what_its_tests_say() -> None:
    promtool("test", "rules", *(str(path) for path in sorted((PROMETHEUS / "tests").glob("*.yml"))))


def test_every_alert_is_tested_where_it_fires_and_where_it_does_not() -> None:
    found_cases = set()
    for path in (PROMETHEUS / "tests").glob("*.yml"):
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            for check in test["promql_expr_test"]:
                found = re.search(r'ALERTS\{alertname="(\w+)"', check["expr"])
                if found:
                    found_cases.add((found[1], bool(check["exp_samples"])))
    assert found_cases == {(name, fires) for name in alerts() for fires in (True, False)}


def test_expressions_name_only_metrics_that_exist() -> None:
    documented = documented_metrics()
    histograms = {name for name, (kind, _) in documented.items() if kind == "histogram"}
    known = set(documented) | {name + part for name in histograms for part in HISTOGRAM_PARTS}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    expressions = [rule["expr"] for rule in rules()] + dashboard_expressions()
    assert len(expressions) > 60
    for expression in expressions:
        assert set(RECORDED.findall(expression)) <= recorded, expression
        assert set(re.findall(r"\bopd_\w+", RECORDED.sub("", expression))) <= known, expression
    # A series that is recorded and used by nobody is a cost for nothing.
    used = {name for expression in expressions for name in RECORDED.findall(expression)}
    assert recorded - used <= {"teacher:opd_pool_backlog_tokens:per_replica"}


def test_expressions_ask_for_labels_that_the_metrics_have() -> None:
    documented = documented_metrics()
    outside = {"job", "instance", "le"}
    for expression in [rule["expr"] for rule in rules()] + dashboard_expressions():
        plain = RECORDED.sub("", expression)
        labels = {label for name in re.findall(r"\bopd_\w+", plain) for label in documented.get(name, ("", ()))[1]}
        asked = {label for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", plain) for label in re.split(r",\s*", group)}
        asked |= set(re.findall(r"[{,]\s*(\w+)\s*=~?", plain))
        if "opd_" in plain:
            assert asked <= labels | outside, expression


def test_alerts_about_errors_ask_for_codes_that_a_teacher_tells() -> None:
    asked: list[str] = []
    for rule in rules():
        for codes in re.findall(r'opd_teacher_errors_total\{code=~"([^"]*)"', rule["expr"]):
            asked += codes.split("|")
    assert sorted(asked) == sorted(set(asked)) and set(asked) <= set(known_codes())
    # Over capacity, late or going down is no fault of a request's and no fault of ours.
    not_asked = {"over_capacity", "deadline_exceeded", "unavailable", "queue_unavailable", "vocabulary_mismatch"}
    assert set(HTTP_STATUS) - set(asked) == not_asked


def test_every_alert_has_a_severity_and_leads_to_its_section_of_the_runbook() -> None:
    text = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(alerts())
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"
        for part in ("**Meaning.**", "**First look.**", "**Mending.**"):
            assert sections[name].count(part) == 1, name


def test_the_dashboard_is_whole() -> None:
    sources = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8")
    )
    uids = {source["uid"] for source in sources["datasources"]}
    assert DASHBOARDS
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text(encoding="utf-8"))
        panels = dashboard["panels"]
        assert dashboard["uid"] and dashboard["title"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        cells = [
            (x, y)
            for panel in panels
            for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        ]
        assert len(set(cells)) == len(cells), "panels lie on each other"
        assert max(x for x, _ in cells) < 24, "a grid has 24 columns"
        for panel in panels:
            if panel["type"] != "row":
                assert panel["datasource"]["uid"] in uids and panel["targets"], panel["title"]


def test_promtool_parses_every_expression_of_the_dashboard(tmp_path) -> None:  # type: ignore[no-untyped-def]
    expressions = [{"record": "dashboard:panel:expression", "expr": text} for text in dashboard_expressions()]
    # Told apart by a label, because promtool refuses the same rule twice.
    for number, rule in enumerate(expressions):
        rule["labels"] = {"number": str(number)}  # type: ignore[assignment]
    path = tmp_path / "dashboard.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": expressions}]}), encoding="utf-8")
    promtool("check", "rules", str(path))
