"""The one retry helper: what it repeats, how long, and what it raises in the end."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from opd.errors import OverCapacityError
from opd.retry import RetryRules, retry

QUICK = RetryRules(total_s=5.0, first_delay_s=0.001, max_delay_s=0.002)


def failing(times: int, error: Exception) -> tuple[Callable[[], Awaitable[str]], list[float]]:
    calls: list[float] = []

    async def operation() -> str:
        calls.append(time.monotonic())
        if len(calls) <= times:
            raise error
        return "done"

    return operation, calls


async def test_repeats_until_it_succeeds_and_reports_each_failure() -> None:
    operation, calls = failing(3, ConnectionError("away"))
    seen: list[Exception] = []
    assert await retry(operation, rules=QUICK, is_retryable=lambda error: True, on_failure=seen.append) == "done"
    assert (len(calls), [str(error) for error in seen]) == (4, ["away"] * 3)


async def test_an_error_that_is_not_retryable_comes_at_once() -> None:
    operation, calls = failing(3, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        await retry(operation, rules=QUICK, is_retryable=lambda error: isinstance(error, OSError))
    assert len(calls) == 1


async def test_the_budget_bounds_the_whole() -> None:
    operation, calls = failing(10**6, ConnectionError("away"))
    rules = RetryRules(total_s=0.1, first_delay_s=0.01, max_delay_s=0.02)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="away"):
        await retry(operation, rules=rules, is_retryable=lambda error: True)
    assert time.monotonic() - began < 1.0
    assert 5 <= len(calls) <= 20


async def test_no_budget_means_one_attempt() -> None:
    operation, calls = failing(1, ConnectionError("away"))
    with pytest.raises(ConnectionError):
        await retry(operation, rules=RetryRules(total_s=0.0), is_retryable=lambda error: True)
    assert len(calls) == 1


async def test_an_attempt_that_hangs_is_cut_off_and_repeated() -> None:
    calls: list[int] = []

    async def operation() -> str:
        calls.append(len(calls))
        if len(calls) == 1:
            await asyncio.sleep(60)
        return "done"

    rules = RetryRules(total_s=5.0, attempt_timeout_s=0.02, first_delay_s=0.001)
    assert await retry(operation, rules=rules, is_retryable=lambda error: isinstance(error, TimeoutError)) == "done"
    assert len(calls) == 2


async def test_a_refusal_that_names_a_time_is_obeyed() -> None:
    operation, calls = failing(1, OverCapacityError("full", retry_after_s=0.2))
    await retry(operation, rules=QUICK, is_retryable=lambda error: True)
    assert calls[1] - calls[0] >= 0.2


async def test_cancelling_ends_it() -> None:
    operation, _ = failing(10**6, ConnectionError("away"))
    task = asyncio.create_task(retry(operation, rules=QUICK, is_retryable=lambda error: True))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_pauses_double_up_to_the_maximum_and_spread() -> None:
    rules = RetryRules(total_s=1.0, first_delay_s=1.0, max_delay_s=5.0)
    longest = rules.delays(lambda: 1.0)
    shortest = rules.delays(lambda: 0.0)
    assert [next(longest) for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert [next(shortest) for _ in range(5)] == [0.5, 1.0, 2.0, 2.5, 2.5]
