"""What lies under a reply key: `status LF retry_after_s LF payload`, as bytes.

Status is `ok` and the payload the reply, or an error's code and its message. The scripts write error frames too, which
is why an error is text here and not an encoded record.
"""

import re

from opd.errors import InternalError, OpdError, from_code

OK = "ok"
_STATUS = re.compile(rb"[a-z_]{1,64}")
_DELAY = re.compile(rb"(\d{1,9}(\.\d{1,9})?)?")


def ok_frame(reply: bytes) -> bytes:
    """Frames an answer."""
    return b"ok\n\n" + reply


def error_frame(error: OpdError) -> bytes:
    """Frames a refusal."""
    retry_after = "" if error.retry_after_s is None else f"{error.retry_after_s:.3f}"
    return f"{error.code}\n{retry_after}\n{error.message}".encode()


def open_frame(frame: bytes) -> bytes | OpdError:
    """The reply, or the error that came in its place (returned, not raised: the caller may want to try again)."""
    parts = frame.split(b"\n", 2)
    if len(parts) != 3 or not (_STATUS.fullmatch(parts[0]) and _DELAY.fullmatch(parts[1])):
        return InternalError(
            f"reply frame of {len(frame)} bytes: is not status, retry_after_s, payload; check the pool"
        )
    status, retry_after, payload = parts
    if status == OK.encode():
        return payload
    retry_after_s = float(retry_after) if retry_after else None
    return from_code(status.decode(), payload.decode("utf-8", "replace"), retry_after_s)
