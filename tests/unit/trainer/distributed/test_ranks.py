"""What ranks agree on, without any process group: several are played by threads that wait for each other."""

import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from opd.errors import ConfigError, InternalError, RankLostError, TeacherUnavailableError
from services.trainer.diagnostics import StepDiagnostics
from services.trainer.diagnostics.means import Mean
from services.trainer.diagnostics.positions import PositionScores
from services.trainer.distributed.means import reduce_counts, reduce_means, slowest
from services.trainer.distributed.pins import SharedPins
from services.trainer.distributed.process_group import RankEnvironment, joined_ranks, rank_device
from services.trainer.distributed.ranks import Alone, Ranks, together
from services.trainer.distributed.share import Share
from services.trainer.horizon import Horizon
from services.trainer.objectives.config import HorizonConfig
from services.trainer.step_rollouts import StepRollouts
from services.trainer.stop import StopRequested
from services.trainer.teachers import NoTeachers
from tests.unit.trainer.test_horizon import agreeing


class ThreadRanks:
    """One of several ranks in one process, over a real barrier."""

    def __init__(self, rank: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.num_ranks = rank, len(table)
        self._table, self._barrier = table, barrier

    def gather(self, value: Any) -> list[Any]:
        self._table[self.rank] = value
        self._barrier.wait(10)
        found = list(self._table)
        self._barrier.wait(10)
        return found

    def total(self, value: int) -> int:
        return sum(self.gather(value))

    def most(self, value: int) -> int:
        return max(self.gather(value))

    def check(self) -> None:
        pass

    def in_step(self) -> AbstractContextManager[None]:
        return nullcontext()


def on_all(num_ranks: int, part: Callable[[Ranks], Any]) -> list[Any]:
    """What each rank returns or raises."""
    table: list[Any] = [None] * num_ranks
    barrier = threading.Barrier(num_ranks)

    def one(rank: int) -> Any:
        try:
            return part(ThreadRanks(rank, table, barrier))
        except (Exception, StopRequested) as error:
            return error

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(one, range(num_ranks)))


def test_all_leave_together_with_the_error_of_one() -> None:
    def part(ranks: Ranks) -> None:
        with together(ranks):
            if ranks.rank == 1:
                raise TeacherUnavailableError("no replica answers", retry_after_s=2.0)

    first, second, third = on_all(3, part)
    assert [type(error) for error in (first, second, third)] == [TeacherUnavailableError] * 3
    assert str(second) == "no replica answers"
    assert str(first) == str(third) == "rank 1: no replica answers"
    assert (first.retry_after_s, first.retryable) == (2.0, True)


@pytest.mark.parametrize(
    ("error", "kind", "heard"),
    [
        (torch.OutOfMemoryError("tried 2 GiB\nmore"), ConfigError, r"^rank 1: out of memory \(tried 2 GiB\); its own"),
        (RuntimeError("DefaultCPUAllocator: no"), ConfigError, r"^rank 1: out of memory \(Default.*\); its own"),
        (OSError("no space left"), InternalError, r"^rank 1: OSError: no space left$"),
    ],
)
def test_an_error_of_others_ends_all_ranks_too(error: Exception, kind: type[Exception], heard: str) -> None:
    def part(ranks: Ranks) -> None:
        with together(ranks):
            if ranks.rank == 1:
                raise error

    first, second = on_all(2, part)
    assert second is error
    assert type(first) is kind
    assert re.match(heard, str(first))


def test_the_lowest_of_several_errors_is_everybodys() -> None:
    def part(ranks: Ranks) -> None:
        with together(ranks):
            if ranks.rank == 0:
                raise StopRequested(15)
            raise InternalError("later")

    found = on_all(2, part)
    assert [(type(error), error.exit_code) for error in found] == [(StopRequested, 143)] * 2


def test_without_an_error_all_go_on_and_alone_nothing_changes() -> None:
    def part(ranks: Ranks) -> str:
        with together(ranks):
            pass
        return "went on"

    assert on_all(2, part) == ["went on"] * 2
    with pytest.raises(ConfigError, match=r"^as it was$"), together(Alone()):
        raise ConfigError("as it was")


class Replaced(NoTeachers):
    """Its teacher is another one from some time of asking on."""

    def __init__(self, changes_at: int) -> None:
        self._changes_at, self._asked = changes_at, 0

    def pin(self) -> dict[str, str]:
        self._asked += 1
        return {"math": "new" if self._asked >= self._changes_at else "old", "code": "one"}


def test_ranks_pin_again_until_all_see_one_teacher() -> None:
    def part(ranks: Ranks) -> dict[str, str]:
        pins = SharedPins(Replaced(1 if ranks.rank else 3), ranks, pause_s=0.01)
        pins.agree()
        return pins.pin()

    assert on_all(2, part) == [{"math": "new", "code": "one"}] * 2


def test_a_step_that_is_sampled_already_keeps_the_teacher_agreed_on_for_it() -> None:
    def part(ranks: Ranks) -> list[dict[str, str]]:
        pins = SharedPins(Replaced(2), ranks, pause_s=0.01)
        ahead = []
        for _ in range(2):
            pins.agree()
            ahead.append(StepRollouts([], pins, rollouts_per_prompt=1))
        return [rollouts.fingerprints for rollouts in ahead]

    for first, second in on_all(2, part):
        assert (first["math"], second["math"]) == ("old", "new")


def test_teachers_that_stay_different_are_an_error_that_may_pass() -> None:
    def part(ranks: Ranks) -> None:
        SharedPins(Replaced(1 if ranks.rank else 99), ranks, pause_s=0.01).agree()

    for error in on_all(2, part):
        assert type(error) is TeacherUnavailableError and error.retryable
        assert re.match(r"^ranks see different teachers after 5 tries \(math: new, old\); wait until", str(error))


@pytest.mark.parametrize(("num_prompts", "num_ranks"), [(5, 2), (8, 3), (7, 7), (64, 8)])
def test_shares_are_a_partition_in_order_and_even(num_prompts: int, num_ranks: int) -> None:
    shares = [Share(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert [place for share in shares for place in share.prompts(num_prompts)] == list(range(num_prompts))
    sizes = [len(share.prompts(num_prompts)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    rollouts = [place for share in shares for place in share.rollouts(num_prompts, 4)]
    assert rollouts == list(range(4 * num_prompts))
    for share in shares:
        assert {place // 4 for place in share.rollouts(num_prompts, 4)} == set(share.prompts(num_prompts))


def test_means_weigh_what_each_rank_saw() -> None:
    seen = [
        {"loss": Mean(total=6.0, count=2), "only/here": Mean(total=1.0, count=1)},
        {"loss": Mean(total=3.0, count=7)},
    ]
    found = on_all(2, lambda ranks: reduce_means(ranks, seen[ranks.rank]))
    assert found[0] == found[1] == {"loss": Mean(total=9.0, count=9), "only/here": Mean(total=1.0, count=1)}
    counts = on_all(2, lambda ranks: reduce_counts(ranks, {"a": ranks.rank + 1.0} | ({"b": 5.0} if ranks.rank else {})))
    assert counts[0] == counts[1] == {"a": 3.0, "b": 5.0}
    assert on_all(2, lambda ranks: slowest(ranks, {"step": 1.0 + ranks.rank}))[0] == {"step": 2.0}


def test_all_ranks_have_the_horizon_of_one_process() -> None:
    """Its reliability is of all rollouts, to the bit; a rank whose own are none or too few has it too."""
    generator = np.random.default_rng(0)
    config = HorizonConfig(start=16, growth=1.5, reliable_at=0.9, unreliable_below=0.6, min_positions=9)
    steps = [
        [agreeing(str(index), 60, [int(ids) for ids in generator.integers(low, 5, 60)]) for index in range(7)]
        for low in (3, 2, 0, 3)
    ]

    def moved(horizon: Horizon, share: slice, gather: Callable[[Any], list[Any]]) -> list[Any]:
        return [(horizon.observe(items[share], gather), horizon.length) for items in steps]

    alone = moved(Horizon(config, longest=60), slice(None), Alone().gather)
    assert len({length for _, length in alone}) > 2 and all(len(metrics) == 2 for metrics, _ in alone)
    shares = [slice(0, 1), slice(1, 1), slice(1, 7)]
    found = on_all(3, lambda ranks: moved(Horizon(config, longest=60), shares[ranks.rank], ranks.gather))
    assert found == [alone] * 3


def test_diagnostics_of_ranks_are_those_of_one_process() -> None:
    generator = np.random.default_rng(0)

    def positions(size: int) -> PositionScores:
        return PositionScores(
            positions_T=np.arange(size),
            student_entropy_T=generator.random(size).astype(np.float32),
            teacher_entropy_T=generator.random(size).astype(np.float32),
        )

    parts = [positions(3), positions(40), positions(7)]
    whole, first, second, everybody = (StepDiagnostics() for _ in range(4))
    for part in parts:
        whole.add_positions(part)
    first.add_positions(parts[0])
    for part in parts[1:]:
        second.add_positions(part)
    for one in (first, second):
        everybody.add_parts(one.parts())
    assert everybody.summary().values == pytest.approx(whole.summary().values, rel=1e-14)
    assert everybody.summary().arrays.keys() == whole.summary().arrays.keys()
    for name, values in whole.summary().arrays.items():
        assert everybody.summary().arrays[name] == pytest.approx(values, rel=1e-14, nan_ok=True)


def test_the_launchers_variables() -> None:
    assert RankEnvironment.read({}) is None
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
    found = RankEnvironment.read(environ)
    assert found is not None
    assert (found.rank, found.num_ranks, found.local_rank, found.port, found.attempt) == (3, 4, 1, 29500, "0")
    with pytest.raises(ConfigError, match=r"^LOCAL_RANK: is not set, but other variables"):
        RankEnvironment.read({name: value for name, value in environ.items() if name != "LOCAL_RANK"})
    with pytest.raises(ConfigError, match=r"^RANK=x: is no number; start with torchrun"):
        RankEnvironment.read(environ | {"RANK": "x"})
    with pytest.raises(ConfigError, match=r"^student\.device=cuda:0: 4 processes need a device each"):
        rank_device("cuda:0", found)


def test_every_process_needs_a_prompt() -> None:
    Share(num_ranks=4).check(4)
    with pytest.raises(ConfigError, match=r"^rollout\.prompts_per_step=3 is below the 4 processes"):
        Share(num_ranks=4).check(3)


def test_others_that_cannot_be_reached_are_one_line_that_may_pass() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        # Bound and not listened on: whoever connects is refused.
        place = RankEnvironment(rank=1, num_ranks=2, local_rank=1, host="127.0.0.1", port=taken.getsockname()[1])
        with (
            pytest.raises(
                RankLostError, match=r"^rank 1 does not reach the others by MASTER_ADDR=127\.0\.0\.1"
            ) as told,
            joined_ranks(place, device="cpu", timeout_s=1.0),
        ):
            pass
    assert told.value.retryable
