import threading
from collections.abc import Iterator

import pytest
import torch

from services.teacher_server.engines.pass_workers import PassWorkers


@pytest.fixture
def workers() -> Iterator[PassWorkers]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    made = PassWorkers()
    yield made
    made.close()
    torch.set_num_threads(before)


def test_passes_run_at_the_same_time_with_one_thread_each_and_without_gradients(workers: PassWorkers) -> None:
    """Each waits for the other, so that one after the other would not end."""
    together = threading.Barrier(2, timeout=5)

    def run() -> tuple[int, bool, str]:
        together.wait()
        return torch.get_num_threads(), torch.is_inference_mode_enabled(), threading.current_thread().name

    found = workers.run([run, run], 2)
    assert [(num_threads, is_inference) for num_threads, is_inference, _ in found] == [(1, True), (1, True)]
    assert len({name for *_, name in found}) == 2
    assert torch.get_num_threads() == 2, "the caller keeps its own number"


def test_threads_that_come_later_and_have_nothing_to_do_with_it_keep_the_default(workers: PassWorkers) -> None:
    def computed() -> int:
        torch.rand(64, 64) @ torch.rand(64, 64)
        torch.arange(100_000).sum()
        return torch.get_num_threads()

    for num_workers in (2, 3):
        assert workers.run([computed] * 6, num_workers) == [1] * 6
        found: list[int] = []
        later = threading.Thread(target=lambda found=found: found.append(computed()))
        later.start()
        later.join()
        assert found == [2]
    assert workers.run([computed] * 6, 3) == [1] * 6
    assert computed() == 2


def test_results_keep_their_order_whatever_is_done_first(workers: PassWorkers) -> None:
    done = threading.Event()

    def slow() -> str:
        assert done.wait(5)
        return "slow"

    def quick() -> str:
        done.set()
        return "quick"

    assert workers.run([slow, quick, quick], 2) == ["slow", "quick", "quick"]


def test_one_worker_is_the_caller(workers: PassWorkers) -> None:
    assert workers.run([threading.get_ident] * 3, 1) == [threading.get_ident()] * 3
    assert workers.run([threading.get_ident], 2) == [threading.get_ident()]


def test_an_error_is_raised_when_nothing_runs_any_more(workers: PassWorkers) -> None:
    failed, ended = threading.Event(), []

    def fail() -> None:
        failed.set()
        raise ValueError("broken")

    def end() -> None:
        assert failed.wait(5)
        ended.append(True)

    with pytest.raises(ValueError, match="broken"):
        workers.run([fail, end, end], 2)
    assert ended == [True, True]


def test_the_number_may_change_and_closing_ends_the_threads(workers: PassWorkers) -> None:
    assert len(workers.run([threading.get_ident] * 4, 2)) == 4
    assert len(workers.run([threading.get_ident] * 4, 3)) == 4
    workers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pass")]
