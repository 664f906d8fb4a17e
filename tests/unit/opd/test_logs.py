"""Log lines that machines read are JSON whatever stands in them."""

import json
import logging

from opd.logs import REQUEST_LOG, JsonFormatter, bound, bound_fields, configure_logging


def test_a_line_is_json_with_its_extras() -> None:
    record = logging.makeLogRecord(
        {"name": "opd.queue", "levelname": "WARNING", "msg": 'said "%s"\n', "args": ("x",), "rollout_id": "run.0.1"}
    )
    entry = json.loads(JsonFormatter().format(record))
    assert (entry["message"], entry["level"], entry["rollout_id"]) == ('said "x"\n', "warning", "run.0.1")


def test_configuring_twice_logs_once() -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging("debug")
        configure_logging("info", as_json=True)
        assert len(root.handlers) == 1 and root.level == logging.INFO
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def test_what_is_bound_stands_in_every_line_within_and_replaces_nothing_of_the_line() -> None:
    record = logging.makeLogRecord({"name": "opd", "levelname": "INFO", "msg": "said", "tenant": "code"})
    with bound(tenant="math", rollout='a"\n', message="none", level="none"), bound(policy_version=3):
        entry = json.loads(JsonFormatter().format(record))
    assert (entry["tenant"], entry["rollout"], entry["policy_version"]) == ("code", 'a"\n', 3)
    assert (entry["message"], entry["level"]) == ("said", "info")
    assert "rollout" not in json.loads(JsonFormatter().format(record))


def test_what_becomes_known_later_stands_in_the_lines_from_then_on_and_nowhere_else() -> None:
    record = logging.makeLogRecord({"name": "opd", "levelname": "INFO", "msg": "said"})
    with bound(request="a"):
        with bound() as fields:
            fields["rollout"] = "run.0.1"
            assert json.loads(JsonFormatter().format(record))["rollout"] == "run.0.1"
            assert dict(bound_fields()) == {"request": "a", "rollout": "run.0.1"}
        assert "rollout" not in json.loads(JsonFormatter().format(record))


def test_requests_are_logged_only_where_asked_for() -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging("info")
        assert not logging.getLogger(REQUEST_LOG).isEnabledFor(logging.INFO)
        configure_logging("info", with_requests=True)
        assert logging.getLogger(REQUEST_LOG).isEnabledFor(logging.INFO)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
