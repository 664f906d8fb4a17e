import grpc
import pytest

from opd import errors
from opd.rpc.status import STATUS, error_from_rpc, trailing_metadata


def all_errors(cls: type[errors.OpdError] = errors.OpdError) -> list[type[errors.OpdError]]:
    return [found for child in cls.__subclasses__() for found in (child, *all_errors(child))]


def rpc_error(
    status: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...] = ()
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details)


def test_every_error_of_the_tree_has_a_status() -> None:
    assert {cls.code for cls in all_errors()} == set(STATUS)
    assert grpc.StatusCode.OK not in STATUS.values() and grpc.StatusCode.UNKNOWN not in STATUS.values()


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_every_error_comes_back_as_itself(cls: type[errors.OpdError]) -> None:
    sent = cls("field=1: too much", retry_after_s=0.25)
    found = error_from_rpc(rpc_error(STATUS[sent.code], sent.message, trailing_metadata(sent)), "host:1")
    assert (type(found), found.message, found.retry_after_s) == (cls, sent.message, 0.25)


@pytest.mark.parametrize(
    ("status", "details", "cls", "retryable"),
    [
        (grpc.StatusCode.UNAVAILABLE, "connection refused", errors.TeacherUnavailableError, True),
        (grpc.StatusCode.CANCELLED, "stopping", errors.TeacherUnavailableError, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "late", errors.DeadlineExceededError, False),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls", errors.OverCapacityError, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max (9 vs. 5)", errors.InvalidRequestError, False),
        (grpc.StatusCode.UNIMPLEMENTED, "no such method", errors.UnsupportedError, False),
        (grpc.StatusCode.UNKNOWN, "odd", errors.InternalError, False),
    ],
    ids=str,
)
def test_what_grpc_itself_raises_becomes_ours(
    status: grpc.StatusCode, details: str, cls: type[errors.OpdError], retryable: bool
) -> None:
    found = error_from_rpc(rpc_error(status, details), "host:1")
    assert type(found) is cls and details in found.message
    assert found.retryable is retryable and (found.retry_after_s is not None) is retryable
