"""Tracing where it is off, where its packages are missing, and what of a request it touches."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from opd import tracing
from opd.errors import InvalidRequestError
from opd.types import ScoreRequest, policy_version_of
from opd.wire import messages
from opd.wire.pb import teacher_pb2 as pb
from tests.observers import Traced

ROOT = Path(__file__).parents[3]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
REQUEST = ScoreRequest(
    rollout_id="run7.3.1", tenant="math", teacher="qwen", prompt_token_ids=np.array([5, 9], np.int32),
    response_token_ids=np.array([7], np.int32),
)  # fmt: skip


def test_off_it_keeps_nothing_and_loads_nothing() -> None:
    code = (
        "import sys\nfrom opd import tracing\n"
        "with tracing.begin('a', parent=None) as span: assert span is tracing.NO_SPAN\n"
        "assert span.child('b') is tracing.NO_SPAN and span.traceparent == ''\n"
        "tracing.record('c', parent='', start_s=0.0, end_s=1.0)\n"
        "tracing.configure_tracing(tracing.TracingSettings(), service='s', instance='i')()\n"
        "loaded = [name for name in sys.modules if name.startswith('opentelemetry')]\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=50)


def test_off_it_costs_less_than_a_thousandth_of_the_fastest_request() -> None:
    rounds = 20_000
    begun = time.process_time()
    for _ in range(rounds):
        tracing.is_on()
        tracing.begin("a", parent="").end()
        tracing.record("b", parent="", start_s=0.0, end_s=0.0)
    # A request over gRPC on loopback takes a millisecond at best.
    assert (time.process_time() - begun) / rounds < 20e-6


def test_without_the_packages_it_says_what_to_install() -> None:
    code = (
        "import sys\nsys.modules['opentelemetry'] = None\nfrom opd import tracing\nfrom opd.errors import ConfigError\n"
        "try: tracing.configure_tracing(tracing.TracingSettings(enabled=True), service='s', instance='i')\n"
        "except ConfigError as error: assert \"pip install 'opd-services[tracing]'\" in error.message\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=50)


def test_the_context_travels_and_is_no_part_of_what_is_asked() -> None:
    traced = dataclasses.replace(REQUEST, traceparent=PARENT)
    assert messages.decode_request(messages.encode_request(traced)).traceparent == PARENT
    assert messages.content_key(traced, "f") == messages.content_key(REQUEST, "f")
    assert messages.encode_request(dataclasses.replace(traced, traceparent="")) == messages.encode_request(REQUEST)


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", PARENT[:-1], PARENT + "0", PARENT.upper(), "01" + PARENT[2:], f"00-{'0' * 32}-{'1' * 16}-01",
     f"00-{'1' * 32}-{'0' * 16}-01", "x" * 100_000],
)  # fmt: skip
def test_a_context_that_is_none_is_left_out_and_refuses_nothing(text: str) -> None:
    message = messages.request_to_proto(REQUEST)
    message.traceparent = text
    assert messages.request_from_proto(pb.ScoreRequest.FromString(message.SerializeToString())).traceparent == ""


@pytest.mark.parametrize(
    ("rollout_id", "version"),
    [("run7.3.1", 3), ("a.b.12.0", 12), ("by-hand", None), ("a.b", None), ("a.x.1", None), ("a.\u0663.1", None)],
)
def test_the_policy_version_stands_in_a_rollouts_id(rollout_id: str, version: int | None) -> None:
    assert policy_version_of(rollout_id) == version


class Closing(str):
    """A trace context that ends the tracing at the moment it is looked at, as another thread may."""

    traced: Traced

    def __eq__(self, other: object) -> bool:
        self.traced.spans()
        return super().__eq__(other)

    __hash__ = str.__hash__

    def __bool__(self) -> bool:
        self.traced.spans()
        return len(self) > 0


@pytest.mark.parametrize("kind", ["begin", "record"])
def test_tracing_that_ends_while_a_span_begins_is_no_fault(kind: str) -> None:
    parent = Closing(PARENT)
    parent.traced = traced = Traced()
    try:
        assert tracing.is_on()
        if kind == "begin":
            tracing.begin("a", parent=parent).end()
        else:
            tracing.record("a", parent=parent, start_s=0.0, end_s=1.0)
        assert not tracing.is_on()
    finally:
        traced.close()


def test_a_span_ends_once_with_the_first_error_it_was_told() -> None:
    traced = Traced()
    try:
        with pytest.raises(ValueError, match="b"), tracing.begin("outer", parent=None) as span:
            span.end(InvalidRequestError("a"))
            raise ValueError("b")
        assert [found.error for found in traced.spans()] == ["invalid_request"]
    finally:
        traced.close()
