"""One error tree for both services and every client.

Each class also is a standard exception, survives pickling and copying, and knows whether trying again can help. `code`
is what travels on the wire; `opd.rpc.status` and the HTTP shell map it to their status numbers in one table each. A
message is one line that names the field, the value and the way out. To add an error: subclass, give it a code, and
add it to the tables; `from_code` finds it by itself.
"""

from typing import ClassVar


class OpdError(Exception):
    """Root of the tree. Catch it at the edge of a process; never raise it itself."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.retry_after_s))


def _rebuild(cls: type[OpdError], message: str, retry_after_s: float | None) -> OpdError:
    return cls(message, retry_after_s=retry_after_s)


class InternalError(OpdError, RuntimeError):
    """A fault of ours; the log of the process that raised it has the traceback."""


class ConfigError(OpdError, ValueError):
    """A setting, file or path given by the user is wrong; raised before anything starts."""

    code = "config"


class InvalidRequestError(OpdError, ValueError):
    """A request breaks the contract: shape, range, size or an id outside the vocabulary."""

    code = "invalid_request"


class UnsupportedError(OpdError, NotImplementedError):
    """The engine cannot supply this field exactly; nothing is approximated."""

    code = "unsupported"


class VocabularyMismatchError(OpdError, ValueError):
    """Student and teacher map ids to different tokens; scores would be silently wrong."""

    code = "vocabulary_mismatch"


class UnauthenticatedError(OpdError, PermissionError):
    """No token, or a token nobody has."""

    code = "unauthenticated"


class PermissionDeniedError(OpdError, PermissionError):
    """A known tenant asked for something it has no right to."""

    code = "permission_denied"


class UnknownTeacherError(OpdError, LookupError):
    """No pool of this name, or none with this fingerprint."""

    code = "unknown_teacher"


class OverCapacityError(OpdError, RuntimeError):
    """The tenant's in-flight cap, the server's intake or Redis's memory is full; come back after `retry_after_s`."""

    code = "over_capacity"
    retryable = True


class DeadlineExceededError(OpdError, TimeoutError):
    """The request's own time-out passed before it was scored."""

    code = "deadline_exceeded"


class TeacherUnavailableError(OpdError, ConnectionError):
    """No replica answers, or the one that did is going down."""

    code = "unavailable"
    retryable = True


class LostRequestError(OpdError, RuntimeError):
    """The queue no longer has the request's body; the client submits it again."""

    code = "lost_request"
    retryable = True


class DeadLetterError(OpdError, RuntimeError):
    """The request took its replica down several times and was put aside, its body kept."""

    code = "dead_letter"


class NonFiniteError(OpdError, ArithmeticError):
    """NaN or infinity in logits, scores, loss or gradients."""

    code = "non_finite"


class QueueUnavailableError(OpdError, ConnectionError):
    """Redis cannot be reached, or was lost for longer than the patience given."""

    code = "queue_unavailable"
    retryable = True


class QueueMisconfiguredError(OpdError, RuntimeError):
    """Redis runs with settings under which requests can vanish, such as an evicting memory policy."""

    code = "queue_misconfigured"


class CheckpointError(OpdError, OSError):
    """A checkpoint could not be written or read; what was on disk before is untouched."""

    code = "checkpoint"


class RankLostError(OpdError, ConnectionError):
    """Another process of a run over several GPUs has ended or no longer answers."""

    code = "rank_lost"
    retryable = True


class RolloutEngineError(OpdError, RuntimeError):
    """The process that samples is gone, or does not sample from the weights it was given."""

    code = "rollout_engine"


def _subclasses(cls: type[OpdError]) -> list[type[OpdError]]:
    return [found for child in cls.__subclasses__() for found in (child, *_subclasses(child))]


def known_codes() -> list[str]:
    """Every code of the tree, sorted."""
    return sorted({OpdError.code, *(cls.code for cls in _subclasses(OpdError))})


def from_code(code: str, message: str, retry_after_s: float | None = None) -> OpdError:
    """Rebuilds an error that came over the wire; an unknown code becomes an `InternalError` that names it."""
    for cls in _subclasses(OpdError):
        if cls.code == code:
            return cls(message, retry_after_s=retry_after_s)
    return InternalError(f"{code}: {message}", retry_after_s=retry_after_s)


def first_line(error: BaseException) -> str:
    """What a library's error says, short enough for a message of ours; the error's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
