"""Reply frames, pinned byte by byte because the scripts write some of them."""

import pytest

from opd.errors import DeadlineExceededError, InternalError, OverCapacityError
from opd.queue.frames import error_frame, ok_frame, open_frame


def test_golden_bytes() -> None:
    assert ok_frame(b"\x00\n\n\xff") == b"ok\n\n\x00\n\n\xff"
    assert error_frame(OverCapacityError("full", retry_after_s=1.5)) == b"over_capacity\n1.500\nfull"
    assert error_frame(DeadlineExceededError("late")) == b"deadline_exceeded\n\nlate"


@pytest.mark.parametrize("reply", [b"", b"\n", b"ok\n\n", bytes(range(256))])
def test_any_reply_survives(reply: bytes) -> None:
    assert open_frame(ok_frame(reply)) == reply


def test_errors_keep_class_message_and_delay() -> None:
    found = open_frame(error_frame(OverCapacityError("tenant=math: full\nreally", retry_after_s=0.25)))
    assert isinstance(found, OverCapacityError)
    assert (found.message, found.retry_after_s) == ("tenant=math: full\nreally", 0.25)


def test_a_script_made_frame_is_read() -> None:
    found = open_frame(b"deadline_exceeded\n\ntimeout_ms=30: passed")
    assert isinstance(found, DeadlineExceededError)
    assert (found.message, found.retryable) == ("timeout_ms=30: passed", False)


@pytest.mark.parametrize("frame", [b"", b"ok", b"ok\n"])
def test_what_is_no_frame_is_an_internal_error(frame: bytes) -> None:
    assert isinstance(open_frame(frame), InternalError)


def test_an_unknown_code_is_named() -> None:
    found = open_frame(b"brand_new\n\nmessage")
    assert isinstance(found, InternalError)
    assert "brand_new" in found.message
