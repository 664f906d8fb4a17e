"""Logging of every process: one dense line an event for people, one JSON object a line for machines.

Libraries log through `logging.getLogger(__name__)` with lazy arguments; only a composition root calls `configure`.
What a line is about (request, rollout, tenant, policy version) is bound once, by who knows it, and stands in every line
that is logged within, in the same thread or task.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from opd.errors import OpdError

REQUEST_LOG = "opd.requests"
"""The logger of one line for each request, silent unless asked for."""

_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_bound: ContextVar[Mapping[str, object]] = ContextVar("opd_log_fields", default={})  # noqa: B039


@contextmanager
def bound(**fields: object) -> Iterator[dict[str, object]]:
    """Adds fields to every JSON line that is logged within; more of them may be put into what it gives."""
    found = {**_bound.get(), **fields}
    token = _bound.set(found)
    try:
        yield found
    finally:
        _bound.reset(token)


def bound_fields() -> Mapping[str, object]:
    """What is bound here: to be bound again by a thread that works for this task."""
    return _bound.get()


class JsonFormatter(logging.Formatter):
    """One object a line; what is bound, and what was passed as `extra`, becomes a field of its own."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        extra = {name: value for name, value in vars(record).items() if name not in _RESERVED}
        entry = {**_bound.get(), **extra, **entry}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logging(level: str = "info", *, as_json: bool = False, with_requests: bool = False) -> None:
    """Sends everything to standard error; called once, by the composition root."""
    handler = logging.StreamHandler(sys.stderr)
    line = logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter() if as_json else line)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger(REQUEST_LOG).setLevel(logging.INFO if with_requests else logging.WARNING)
    # Third parties speak up only when something is wrong.
    for name in ("httpx", "urllib3", "asyncio", "filelock", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)


def is_json() -> bool:
    """Whether this process was told to write JSON, so that nothing else may stand between its lines."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def give_up(program: str, error: OpdError) -> None:
    """The last line of a process that a user's mistake or a lost service ends."""
    if is_json():
        logging.getLogger(program).error("%s", error.message, extra={"code": error.code})
    else:
        sys.stderr.write(f"{program}: {error.message}\n")
