"""What a test sees of the signals of processes and servers: JSON log lines, spans, counted errors."""

import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from opd.logs import REQUEST_LOG, JsonFormatter
from opd.tracing import TracingSettings, configure_tracing
from tests.integration.deploy.collector import CollectedSpan, Collector

PARENT_TRACE, PARENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{PARENT_TRACE}-{PARENT_SPAN}-01"
"""The trace context of somebody who asks."""


class JsonLog:
    """Every line of this process, requests among them, as a process with `log_json` and `log_requests` writes it."""

    def __init__(self) -> None:
        self._text = io.StringIO()
        self._handler = logging.StreamHandler(self._text)
        self._handler.setFormatter(JsonFormatter())

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._text.getvalue().splitlines()]

    def matching(self, message: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if re.search(message, line["message"])]

    @contextmanager
    def __call__(self) -> Iterator["JsonLog"]:
        requests, root = logging.getLogger(REQUEST_LOG), logging.getLogger()
        before = requests.level
        root.addHandler(self._handler)
        requests.setLevel(logging.INFO)
        try:
            yield self
        finally:
            requests.setLevel(before)
            root.removeHandler(self._handler)


class Traced:
    """This process traces into a real collector; `spans` ends that and returns what was sent."""

    def __init__(self) -> None:
        self._collector = Collector()
        settings = TracingSettings(enabled=True, endpoint=self._collector.endpoint)
        self._close_tracing = configure_tracing(settings, service="test", instance="one")

    def spans(self) -> list[CollectedSpan]:
        self._close_tracing()
        return self._collector.spans

    def by_name(self) -> dict[str, CollectedSpan]:
        found: dict[str, CollectedSpan] = {}
        for span in self.spans():
            assert span.name not in found, f"two spans {span.name}"
            found[span.name] = span
        return found

    def close(self) -> None:
        self._close_tracing()
        self._collector.close()


@pytest.fixture
def log() -> Iterator[JsonLog]:
    with JsonLog()() as found:
        yield found


@pytest.fixture
def traced() -> Iterator[Traced]:
    found = Traced()
    try:
        yield found
    finally:
        found.close()


def counted_errors(metrics: str) -> dict[str, int]:
    """By code, out of the text of /metrics; without those that are 0."""
    found = re.findall(r'^opd_teacher_errors_total\{code="(\w+)"\} ([\d.]+)$', metrics, re.MULTILINE)
    return {code: int(float(count)) for code, count in found if float(count)}
