"""One error tree: every class travels by its code, keeps its message, and is also a standard exception."""

import copy

import pytest

from opd import errors
from opd.errors import OpdError, first_line, from_code

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, OpdError)]
CONCRETE = [cls for cls in CLASSES if cls is not OpdError]


def test_codes_are_unique() -> None:
    assert len({cls.code for cls in CONCRETE}) == len(CONCRETE) >= 15


@pytest.mark.parametrize("cls", CONCRETE)
def test_each_travels_by_code(cls: type[OpdError]) -> None:
    error = from_code(cls.code, "field=1: too small; give 2", 0.5)
    assert type(error) is cls
    assert (str(error), error.retry_after_s) == ("field=1: too small; give 2", 0.5)


@pytest.mark.parametrize("cls", CONCRETE)
def test_each_has_a_standard_parent_and_can_be_copied(cls: type[OpdError]) -> None:
    assert any(
        parent.__module__ == "builtins" and parent not in (Exception, BaseException, object) for parent in cls.__mro__
    )
    twin = copy.copy(cls("m", retry_after_s=2.0))
    assert type(twin) is cls and (twin.message, twin.retry_after_s) == ("m", 2.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("\n broken header\nat byte 3", "broken header"), ("", "ValueError"), ("x" * 300, "x" * 200)],
)
def test_what_a_library_says_becomes_one_short_line(text: str, expected: str) -> None:
    assert first_line(ValueError(text)) == expected
