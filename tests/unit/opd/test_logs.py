"""Log lines that machines read are JSON whatever stands in them."""

import json
import logging

from opd.logs import JsonFormatter, configure_logging


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
